"""labelled_rows.py: tables read some questions at a time give the rows of whole ones."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from medmm_ray.data import records
from medmm_ray.data.sorted_rows import windows
from medmm_ray.train import labelled_rows
from medmm_ray.train.labelled_rows import LabelledRows, LabelRules, TwoTowerRows, TwoTowerRules
from medmm_ray.train.launch import read_input, write_inputs
from medmm_ray.train.text_prm_data import SCHEMA
from tests.train import toy
from tests.train.conftest import labelled


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question a window."""
    monkeypatch.setattr("medmm_ray.data.sorted_rows.BATCH_BYTES", 1)
    monkeypatch.setattr(labelled_rows, "windows", partial(windows, num_bytes=1))


def parts(table: pa.Table) -> list[pa.Table]:
    """The rows in the opposite order, two a part."""
    reverse = table.take(list(reversed(range(table.num_rows))))
    return [reverse.slice(start, 2) for start in range(0, table.num_rows, 2)]


@pytest.mark.usefixtures("small_windows")
def test_text_rows_are_those_of_whole_tables_and_lie_in_one_file(tmp_path: Path) -> None:
    solutions = toy.solutions(each=4)
    rows = LabelledRows(
        LabelRules("judge", "collapse", None, None),
        parts(toy.table(records.Question, toy.questions())),
        parts(toy.table(records.Evidence, toy.evidence())),
        parts(toy.table(records.Solutions, solutions)),
        parts(toy.table(records.Labels, toy.judge_labels(solutions))),
    )
    uris = write_inputs({"questions": rows}, str(tmp_path / "inputs"))
    written = read_input(uris["questions"])
    assert written.schema == SCHEMA
    assert written.to_pylist() == labelled(each=4).to_pylist()
    assert rows.right_steps.share == pytest.approx(4 / 6)
    assert rows.consensus == {}


@pytest.mark.usefixtures("small_windows")
def test_consensus_is_counted_over_all_windows() -> None:
    solutions = toy.solutions(3, each=2)
    judged = toy.judge_labels(solutions)

    def rows(labels: list[records.Labels]) -> LabelledRows:
        return LabelledRows(
            LabelRules("consensus", "collapse", None, 0),
            [toy.table(records.Question, toy.questions(3))],
            [],
            [toy.table(records.Solutions, solutions)],
            [toy.table(records.Labels, labels)],
        )

    with pytest.raises(ValueError, match=r"of 3 judged solutions without a right answer it has that on none"):
        list(rows(judged))
    first = records.StepLabel(label=1)
    continued = [replace(row, source="monte_carlo", steps=[first, *row.steps[1:]]) for row in judged]
    settled = rows(judged + continued)
    assert [part.num_rows for part in settled] == [1, 1, 1]
    assert (settled.consensus["consensus_agreed"], sum(settled.consensus.values())) == (6, 6)


def test_nothing_to_train_on_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    rules = TwoTowerRules("judge", "keep", 0)
    rows = TwoTowerRows(rules, pa.table({"table": [], "name": []}), [], [], [], [], [])
    with pytest.raises(ValueError, match=r"no training question has an image, states and a target \(0 states"):
        write_inputs({"questions": rows}, str(tmp_path / "inputs"))
    assert not (tmp_path / "inputs").exists()
