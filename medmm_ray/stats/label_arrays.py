"""Solutions and labels as arrays: the steps of a whole table in a few bytes each, without one Python object a row.

Enters: tables of `Solutions` and of `Labels`, whole or part by part, so that texts are read and let go. Leaves:
`Steps`, the flat order of all steps, and for each source one int8 a step: RIGHT, WRONG, NEUTRAL (looked at, nothing
checkable) or UNLABELLED.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medmm_ray.data.tables import error_kind
from medmm_ray.stats.targets import ADJUDICATOR

Ints = NDArray[np.int64]
Codes = NDArray[np.int8]
RIGHT, WRONG, NEUTRAL, UNLABELLED = 1, 0, -1, -2


@dataclass(frozen=True)
class Steps:
    """All steps of a table of solutions, in its order: step j of solution i is row ``first[i] + j``.

    `row` is each solution's row in the table, `question` the number of its question, in the order of the table: rows
    about one question, of several sources of solutions, share it. `length` is a solution's number of steps; `solution`
    is each step's solution and `index` its place in it.
    """

    solution_ids: pa.Array
    row: Ints
    question: Ints
    length: Ints
    first: Ints
    solution: Ints
    index: Ints


def drop_texts(solutions: pa.Table) -> pa.Table:
    """A table of `Solutions` without its texts: of each solution its id, `correct`, finish_reason and `num_steps`."""
    nested = solutions["solutions"].combine_chunks()
    flat = pc.list_flatten(nested)
    fields = {name: flat.field(name) for name in ("solution_id", "correct", "finish_reason")}
    fields["num_steps"] = pc.list_value_length(flat.field("steps"))
    structs = pa.StructArray.from_arrays(
        list(fields.values()),
        list(fields),
    )
    lists = pa.ListArray.from_arrays(_offsets(nested), structs)
    names = [name for name in solutions.column_names if name != "solutions"]
    return solutions.select(names).append_column("solutions", lists)


def steps_of(solutions: pa.Table) -> Steps:
    """The steps of a table of solutions (`drop_texts`)."""
    nested = solutions["solutions"].combine_chunks()
    flat = pc.list_flatten(nested)
    length = np.asarray(flat.field("num_steps"), dtype=np.int64)
    first = np.cumsum(length) - length
    solution = np.repeat(np.arange(len(length)), length)
    row = np.asarray(pc.list_parent_indices(nested), dtype=np.int64)
    question_ids = solutions["question_id"].combine_chunks()
    question_of_row = np.asarray(pc.index_in(question_ids, question_ids.unique()), dtype=np.int64)
    # Several rows may be about one question: its number, not the row's, is what a resample draws.
    return Steps(
        solution_ids=flat.field("solution_id"),
        row=row,
        question=question_of_row[row],
        length=length,
        first=first,
        solution=solution,
        index=np.arange(len(solution)) - first[solution],
    )


def _offsets(nested: pa.ListArray) -> pa.Array:
    """Where the lists begin and end in their flat entries (a slice's own offsets count from the whole array)."""
    return pc.subtract(nested.offsets, nested.offsets[0])


@dataclass(frozen=True)
class AlignedLabels:
    """Where the entries of a list column of label rows belong: entry `entry[k]` of the flat list is step `row[k]`.

    Rows of no solution here (`unknown`), and of another number of steps than their solution (`misfit`: they belong to
    another text), have no place.
    """

    row: Ints
    entry: Ints
    unknown: int
    misfit: int


def align_labels(steps: Steps, labels: pa.Table) -> AlignedLabels:
    """The steps that the entries of ``labels["steps"]`` speak about. Needs the columns solution_id and steps."""
    nested = labels["steps"].combine_chunks()
    matches = pc.index_in(labels["solution_id"].combine_chunks(), steps.solution_ids)
    solution = np.asarray(pc.fill_null(matches, -1), dtype=np.int64)  # of each label row
    starts = np.asarray(_offsets(nested), dtype=np.int64)
    lengths = np.diff(starts)
    is_known = solution >= 0
    fits = is_known
    if len(steps.length):
        expected_lengths = np.where(
            is_known,
            steps.length[solution],
            0,
        )
        fits = is_known & (lengths == expected_lengths)
    label_row = np.repeat(np.arange(len(solution)), lengths)  # of each entry
    entry = np.flatnonzero(fits[label_row])
    label_row = label_row[entry]
    row = steps.first[solution[label_row]] + entry - starts[label_row]
    num_unknown = int((~is_known).sum())
    return AlignedLabels(
        row,
        entry,
        num_unknown,
        int((~fits).sum()) - num_unknown,
    )


def label_codes(entries: pa.StructArray) -> pa.Array:
    """`StepLabel` entries as int8 codes: the label; without one, whether the value is above 0; else neutral or none."""
    # All sources at once, in Arrow: a table of a million solutions has ten million entries.
    label = pc.cast(entries.field("label"), pa.int8())
    value_above_zero = pc.cast(
        pc.greater(entries.field("value"), 0),
        pa.int8(),
    )
    is_looked_at = pc.or_(
        pc.is_valid(entries.field("confidence")),
        pc.is_valid(entries.field("reason")),
    )
    no_verdict = pc.if_else(
        is_looked_at,
        pa.scalar(NEUTRAL, pa.int8()),
        pa.scalar(UNLABELLED, pa.int8()),
    )
    return pc.coalesce(label, value_above_zero, no_verdict)


def encode_labels(labels: pa.Table) -> pa.Table:
    """A table of `Labels` without its texts: `steps` a list of codes, the others as they are.

    A row with a value that is no number from 0 to 1 (NaN) has the error ``label_value``: it says nothing.
    """
    nested = labels["steps"].combine_chunks()
    entries = pc.list_flatten(nested)
    lists = pa.ListArray.from_arrays(
        _offsets(nested),
        label_codes(entries),
    )
    names = [name for name in labels.column_names if name not in ("steps", "question_id", "error")]
    errors = _with_label_faults(
        labels["error"].combine_chunks(),
        nested,
        entries.field("value"),
    )
    return labels.select(names).append_column("error", errors).append_column("steps", lists)


def _with_label_faults(errors: pa.Array, nested: pa.ListArray, value: pa.Array) -> pa.Array:
    """The rows' errors, with one for each row that had none and has a value outside 0 to 1."""
    in_range = pc.and_(
        pc.greater_equal(value, 0),
        pc.less_equal(value, 1),
    )
    is_sound = np.asarray(pc.fill_null(in_range, True), dtype=bool)  # a null is no value
    label_row = np.asarray(pc.list_parent_indices(nested), dtype=np.int64)
    is_broken = np.zeros(len(errors), dtype=bool)
    is_broken[label_row[~is_sound]] = True
    fault = pa.scalar("label_value: a step's value is no number from 0 to 1; label the solution again")
    return pc.if_else(
        pc.and_(pa.array(is_broken), pc.is_null(errors)),
        fault,
        errors,
    )


@dataclass
class SourceCodes:
    """What one source says of all steps of a table: `codes`, one a step, and what did not count, by reason."""

    codes: Codes
    rows: int = 0
    cost: float = 0.0
    unknown: int = 0
    misfit: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def source_labels(
    steps: Steps,
    labels: pa.Table,
    sources: Iterable[str] = (),
) -> dict[str, SourceCodes]:
    """Encoded labels (`encode_labels`) of any sources, by source; of each of `sources`, also where it has no row.

    Rows with an error, of no solution or of another text are only counted.

    Several annotators of a source: the adjudicator where he has a verdict, else the majority, a tie is no label.
    """
    by_source = {}
    for source in sorted({*sources, *labels["source"].unique().to_pylist()}):
        by_source[source] = _source_codes(steps, labels.filter(pc.equal(labels["source"], source)))
    return by_source


def _source_codes(steps: Steps, labels: pa.Table) -> SourceCodes:
    usable = labels.filter(pc.is_null(labels["error"]))
    aligned = align_labels(steps, usable)
    code = np.asarray(pc.list_flatten(usable["steps"].combine_chunks()), dtype=np.int8)[aligned.entry]
    lengths = np.asarray(pc.list_value_length(usable["steps"]))
    label_row = np.repeat(np.arange(usable.num_rows), lengths)[aligned.entry]
    is_adjudicator = np.asarray(pc.equal(usable["annotator"], ADJUDICATOR), dtype=bool)[label_row]
    codes = _majority(
        len(steps.solution),
        aligned.row[~is_adjudicator],
        code[~is_adjudicator],
    )
    has_last_word = is_adjudicator & (code != UNLABELLED)
    # Written last, over what the majority says.
    codes[aligned.row[has_last_word]] = code[has_last_word]
    kinds = map(error_kind, pc.drop_null(labels["error"]).to_pylist())
    return SourceCodes(
        codes=codes,
        rows=usable.num_rows,
        cost=float(pc.sum(labels["cost"]).as_py() or 0.0),
        unknown=aligned.unknown,
        misfit=aligned.misfit,
        errors=dict(Counter(kinds)),
    )


def _majority(num_steps: int, row: Ints, code: Codes) -> Codes:
    """Of all verdicts on each step the majority, no label where they tie, else NEUTRAL where somebody looked."""
    right = np.bincount(row[code == RIGHT], minlength=num_steps)
    wrong = np.bincount(row[code == WRONG], minlength=num_steps)
    codes = np.full(num_steps, UNLABELLED, dtype=np.int8)
    # Each line overrules those before it: a verdict counts for more than a neutral word, a tie takes both away.
    codes[row[code == NEUTRAL]] = NEUTRAL
    codes[(right > 0) & (right == wrong)] = UNLABELLED
    codes[right > wrong] = RIGHT
    codes[wrong > right] = WRONG
    return codes
