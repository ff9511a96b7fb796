"""Solutions with labelled steps, as rows of published tables have them.

Enters: a row and its `StepColumns`. Leaves: a `SourceSolution`; labels that do not fit its steps are an error alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medmm_ray.data.columns import StepColumns, value_at
from medmm_ray.data.records import StepLabel
from medmm_ray.data.sources import SourceLabels, SourceSolution
from medmm_ray.data.tables import RowError, TableError
from medmm_ray.text import extract_answer, join_steps, without_mark

ANNOTATOR = "published"


def solution_of(
    columns: StepColumns,
    row: Mapping[str, Any],
    where: str,
) -> SourceSolution:
    """The solution of a row, with its labels."""
    entries = value_at(row, columns.column, where)
    if not isinstance(entries, list) or not entries:
        raise TableError(f"{where}: the column {columns.column!r} must be a list of steps")
    steps = [_step_text(columns, entry, where) for entry in entries]
    text = join_steps(steps)
    # Nobody says of PRM800K whether its answers are right.
    right = value_at(row, columns.right, where) if columns.right else None
    return SourceSolution(
        text=text,
        steps=steps,
        answer=extract_answer(text, (), "open"),
        correct=None if right is None else bool(right),
        labels=[
            _labels(
                columns,
                row,
                entries,
                where,
            )
        ],
    )


def _step_text(
    columns: StepColumns,
    entry: Any,
    where: str,
) -> str:
    text = value_at(entry, columns.text, where) if columns.text else entry
    if not isinstance(text, str):
        raise TableError(
            f"{where}: a step of {columns.column!r} is a {type(text).__name__}; `steps.text` says where its text is"
        )
    return without_mark(text).strip()


def _labels(
    columns: StepColumns,
    row: Mapping[str, Any],
    entries: Sequence[Any],
    where: str,
) -> SourceLabels:
    try:
        steps = _step_labels(
            columns,
            row,
            entries,
            where,
        )
    except RowError as error:
        return SourceLabels(source=columns.source, annotator=ANNOTATOR, error=str(error))
    return SourceLabels(
        source=columns.source,
        annotator=ANNOTATOR,
        steps=steps,
        saw_answer=False,
    )


def _step_labels(
    columns: StepColumns,
    row: Mapping[str, Any],
    entries: Sequence[Any],
    where: str,
) -> list[StepLabel]:
    # Each form has its labels in a place of its own; the first that is named is read.
    number = len(entries)
    if columns.value:
        return [_of_value(value_at(entry, columns.value, where)) for entry in entries]
    if columns.label:
        return [_of_rating(value_at(entry, columns.label, where)) for entry in entries]
    if columns.labels:
        ratings = value_at(row, columns.labels, where)
        if not isinstance(ratings, list) or len(ratings) != number:
            raise RowError("label_count", f"{columns.labels} does not have {number} labels for {number} steps")
        return list(map(_of_rating, ratings))
    if columns.first_error:
        return _until(int(value_at(row, columns.first_error, where)), number)
    if columns.wrong_steps:
        # Counted from 1 in PRMBench.
        wrong_places = {int(place) - columns.first_number for place in value_at(row, columns.wrong_steps, where) or ()}
        if not wrong_places <= set(range(number)):
            raise RowError("label_value", f"{columns.wrong_steps} names steps beyond the {number} that there are")
        return [StepLabel(label=int(place not in wrong_places)) for place in range(number)]
    raise TableError("steps has no labels: name one of label, value, labels, first_error, wrong_steps")


def _of_value(value: Any) -> StepLabel:
    if value is None:
        return StepLabel()
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RowError("label_value", f"a value must lie between 0 and 1, not {value!r}")
    # A step counts as right where any continuation came out right.
    return StepLabel(label=int(value > 0), value=float(value))


def _of_rating(rating: Any) -> StepLabel:
    """1 right, -1 wrong; 0 and null are neutral, which is no label; true and false, + and - are as good."""
    if isinstance(rating, bool):
        return StepLabel(label=int(rating))
    if rating is None:
        return StepLabel()
    if str(rating) not in _RATINGS:
        raise RowError("label_value", f"a label must be 1, 0 or -1, not {rating!r}")
    return StepLabel(label=_RATINGS[str(rating)])


_RATINGS = {"1": 1, "+": 1, "-1": 0, "-": 0, "0": None}


def _until(first_error: int, number: int) -> list[StepLabel]:
    if not -1 <= first_error < number:
        raise RowError("label_value", f"the first error is step {first_error} of {number}")
    if first_error < 0:
        return [StepLabel(label=1)] * number
    # What follows an error was not looked at.
    behind = number - first_error - 1
    return [*[StepLabel(label=1)] * first_error, StepLabel(label=0), *[StepLabel()] * behind]
