"""The reasoning that a query carries is the first solution that an earlier run has of its question."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs.embed import TRACES, first_solutions
from medmm_ray.data.records import Solution, Solutions, to_arrow
from medmm_ray.data.tables import Table, TableError
from tests.doubles.vector_tables import table_of


def solutions(question_id: str, *texts: str) -> Solutions:
    listed = [
        Solution(
            solution_id=f"{question_id}-{i}", index=i, text=text, steps=[text], answer="A", correct=True,
            finish_reason="stop", seed=0, text_sha="",
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return Solutions(
        question_id=question_id,
        policy="p",
        config_hash="c",
        num_requested=len(texts),
        solutions=listed,
        error=None if texts else "empty: nothing was drawn",
    )


def test_the_first_solution_of_each_question(tmp_path: Path) -> None:
    rows = [solutions("q1", "Step 1: Look.", "Step 1: Guess."), solutions("q2"), solutions("q3", "Step 1: Ask.")]
    table = table_of(Solutions, to_arrow(Solutions, rows), str(tmp_path / "solutions"), rows_per_file=2)
    traces = pa.concat_tables(first_solutions(table))
    assert traces.schema == TRACES
    assert dict(zip(traces["question_id"].to_pylist(), traces["trace"].to_pylist(), strict=True)) == {
        "q1": "Step 1: Look.",
        "q2": None,
        "q3": "Step 1: Ask.",
    }


def test_a_table_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="not complete"):
        list(first_solutions(Table(str(tmp_path / "none"), Solutions)))
