"""An evaluated run in other tools' files: their fields, and figures that are the report's."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from huggingface_hub import eval_result_entries_to_yaml, parse_eval_result_entries

from medmm_ray.pages.harness import HarnessRun, eval_results, results, write_lm_eval
from medmm_ray.steps.evaluate import EvaluateConfig, evaluate
from tests.doubles.synthetic import run

DATE = "2026-11-30T22:00:00+00:00"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = run(tmp_path_factory.mktemp("images"), num_questions=12, num_samples=4)
    names = ["vqa_rad", "slake"] * 6
    place = made["questions"].schema.get_field_index("dataset")
    made["questions"] = made["questions"].set_column(place, "dataset", pa.array(names[: made["questions"].num_rows]))
    return made


@pytest.fixture(scope="module")
def harness(tables: dict[str, Any]) -> HarnessRun:
    evaluation = evaluate(EvaluateConfig(bootstrap_samples=50), **tables)
    return HarnessRun(evaluation.report, evaluation.outcomes, "org/policy", DATE)


def test_results_are_the_reports(harness: HarnessRun) -> None:
    document = json.loads(json.dumps(results(harness)))
    figures, group = document["results"]["slake"], harness.report.by_dataset["slake"]
    assert figures["exact_match,best_of_n_multimodal"] == group.best_of_n["multimodal"].value
    assert figures["exact_match,one_sample"] == group.one_sample.value
    low, high = group.one_sample.low, group.one_sample.high
    assert low is not None
    assert high is not None
    assert figures["exact_match_stderr,one_sample"] == pytest.approx((high - low) / 3.919928)
    assert document["n-samples"]["slake"] == {"original": group.questions, "effective": group.questions}
    assert document["model_name_sanitized"] == "org__policy"


def test_samples_add_up_to_the_results(harness: HarnessRun, tables: dict[str, Any], tmp_path: Path) -> None:
    counts = write_lm_eval(str(tmp_path), harness, tables["questions"], [tables["solutions"]])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "results_2026-11-30T22-00-00+00-00.json",
        "samples_slake_2026-11-30T22-00-00+00-00.jsonl",
        "samples_vqa_rad_2026-11-30T22-00-00+00-00.jsonl",
    ]
    lines = [json.loads(line) for line in (tmp_path / "samples_slake_2026-11-30T22-00-00+00-00.jsonl").open()]
    assert len(lines) == counts["slake"] == 8 * len({line["doc_id"] for line in lines})
    chances = [line["exact_match"] for line in lines if line["filter"] == "best_of_n_multimodal"]
    expected = harness.report.by_dataset["slake"].best_of_n["multimodal"].value
    assert sum(chances) / len(chances) == pytest.approx(expected, abs=1e-6)
    best = next(line for line in lines if line["filter"] == "best_of_n_text_only" and line["exact_match"] == 1)
    assert best["filtered_resps"] == [best["target"]]
    assert best["resps"] == [[solution["text"] for solution in solutions_of(tables, best["doc"]["question_id"])]]


def solutions_of(tables: dict[str, Any], question_id: str) -> list[dict[str, Any]]:
    rows = {row["question_id"]: row["solutions"] for row in tables["solutions"].to_pylist()}
    found: list[dict[str, Any]] = rows[question_id]
    return found


def test_the_hubs_file_names_the_data_set_and_how_the_answer_was_chosen(harness: HarnessRun) -> None:
    files = eval_results(harness, {"slake": "mdwiratathya/SLAKE-vqa-english"}, source="https://example.org/report")
    assert list(files) == [".eval_results/slake.yaml"]
    (entry,) = yaml.safe_load(files[".eval_results/slake.yaml"])
    assert entry["dataset"] == {"id": "mdwiratathya/SLAKE-vqa-english", "task_id": "slake"}
    assert entry["value"] == pytest.approx(100 * harness.report.by_dataset["slake"].best_of_n["multimodal"].value)
    assert entry["notes"].startswith("best of 4 by a process reward model (multimodal), 95 % interval ")
    assert entry["source"]["url"] == "https://example.org/report"
    # The hub's own reader sees all of it: what it does not know it would leave out.
    (parsed,) = parse_eval_result_entries([entry])
    assert eval_result_entries_to_yaml([parsed]) == [entry]
