import dataclasses
import inspect

import pyarrow as pa
import pytest

from medmm_ray.data import records
from medmm_ray.data.records import Labels, Question, Solutions, States, StepLabel, arrow_schema, from_dict, to_arrow

RECORDS = [r for _, r in inspect.getmembers(records, dataclasses.is_dataclass)]


def test_schema_is_derived_with_explicit_lists_and_nulls() -> None:
    schema = arrow_schema(Question)
    assert schema.field("options").type == pa.list_(pa.string())
    assert not schema.field("question_id").nullable
    assert schema.field("error").nullable
    assert arrow_schema(States).field("text_log_odds").type == pa.list_(pa.float32())
    steps = arrow_schema(Labels).field("steps").type.value_type
    assert steps.field("label").type == pa.int64()
    assert steps.field("label").nullable


def test_round_trip_of_nested_records() -> None:
    row = Labels(
        question_id="q", solution_id="s", source="judge", annotator="m@p", cost=0.25,
        steps=[StepLabel(label=1, confidence="high"), StepLabel()],
    )  # fmt: skip
    assert from_dict(Labels, to_arrow(Labels, [row]).to_pylist()[0]) == row


def test_a_null_label_stays_null_and_is_never_zero() -> None:
    table = to_arrow(Labels, [{"question_id": "q", "solution_id": "s", "source": "x", "annotator": "y", "cost": 0.0,
                               "steps": [{"label": None}, {"label": 0}]}])  # fmt: skip
    assert [s["label"] for s in table["steps"][0].as_py()] == [None, 0]


@pytest.mark.parametrize("record", [r for r in RECORDS if "key" in vars(r)], ids=lambda r: r.__name__)
def test_every_table_has_its_key_among_its_columns_and_an_error_column(record: type) -> None:
    names = arrow_schema(record).names
    assert set(record.key) <= set(names)  # type: ignore[attr-defined]
    assert names[-1] == "error"


def test_a_table_of_an_earlier_version_is_read_with_defaults() -> None:
    row: dict[str, object]
    row = {"question_id": "q", "source": "s", "split": "test", "modality": "m", "difficulty": "", "question": "Q",
           "options": [], "answer": "a", "answer_type": "open", "image_ids": [], "error": None}  # fmt: skip
    question = from_dict(Question, row)
    assert (question.dataset, question.group, question.error) == ("", "", None)
    assert from_dict(StepLabel, {}) == StepLabel()


def test_missing_required_value_is_refused() -> None:
    with pytest.raises(TypeError, match="question_id"):
        Solutions(policy="p")  # type: ignore[call-arg]
