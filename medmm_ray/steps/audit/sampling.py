"""What was asked of the policy and what came: coverage, solutions a question, answers, and steps a solution."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.tables import error_kind
from medmm_ray.stats.grouped_stats import (
    CountedFigure,
    GroupedStats,
    Groups,
    Resampling,
    easy_first,
    ratio,
    share_of_counts,
    stats_by_group,
)
from medmm_ray.stats.label_arrays import RIGHT, Codes, Steps


@dataclass
class ModalityCounts:
    """What there is of one modality; `solutions` are those of all sources."""

    questions: int
    with_image: int
    images: int
    solutions: int
    by_difficulty: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Usable questions in all and by split, images, and what there is of each modality."""

    questions: int
    images: int
    splits: dict[str, int]
    difficulties: list[str]
    modalities: dict[str, ModalityCounts]


@dataclass(frozen=True, kw_only=True)
class SamplingFigures:
    """What the policy was asked for and what came: questions, solutions, their answers."""

    questions: int
    requested: int
    kept: int
    drawn: int
    rejected: dict[str, int]
    """Samples that the quality filter refused, by reason."""
    short_questions: int
    """Questions with fewer solutions than were asked for."""
    empty_questions: int
    missing: int
    without_answer: int
    finish_reasons: dict[str, int]
    errors: dict[str, int]
    accuracy: GroupedStats
    """The share of right answers."""


@dataclass(frozen=True, kw_only=True)
class TreeFigures:
    """What the trees found: questions with a solution, solutions, and right ones."""

    questions: int
    solutions: int
    right: int


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Steps a solution: solutions by their number of steps, the mean, and solutions outside the usual numbers."""

    solutions: int
    steps: int
    histogram: dict[str, int]
    mean: CountedFigure
    few: int
    many: int


def coverage(
    questions: pa.Table,
    images: pa.Table,
    solutions: pa.Table,
) -> Coverage:
    """Questions by split, and by modality: questions by difficulty, those with an image, images, and solutions."""
    usable = questions.filter(pc.is_null(questions["error"]))
    # Counted once, as not every image has a question.
    num_images = Counter(images["modality"].to_pylist())
    modalities: dict[str, ModalityCounts] = {}
    for group in _groups(usable, solutions).to_pylist():
        modality, num_questions = group["modality"], group["count_all"]
        if modality not in modalities:
            modalities[modality] = ModalityCounts(0, 0, num_images[modality], 0, {})
        counts = modalities[modality]
        counts.questions += num_questions
        counts.with_image += group["with_image_sum"]
        counts.solutions += group["solutions_sum"]
        counts.by_difficulty[group["difficulty"]] = num_questions
    splits = Counter(usable["split"].to_pylist())
    difficulties = set(usable["difficulty"].to_pylist())
    return Coverage(
        questions=usable.num_rows,
        images=images.num_rows,
        splits=dict(sorted(splits.items())),
        difficulties=sorted(difficulties, key=easy_first),
        modalities=dict(sorted(modalities.items())),
    )


def _groups(questions: pa.Table, solutions: pa.Table) -> pa.Table:
    """A row for each modality and difficulty, in the order in which they come: its questions, images, solutions."""
    lengths = pc.list_value_length(solutions["solutions"])
    solved = pa.table({"question_id": solutions["question_id"], "solutions": lengths})
    by_question = solved.group_by("question_id").aggregate([("solutions", "sum")])
    place = pc.index_in(questions["question_id"], by_question["question_id"].combine_chunks())
    num_solutions = by_question["solutions_sum"].take(place)
    counted = pa.table(
        {
            "modality": questions["modality"],
            "difficulty": questions["difficulty"],
            "with_image": pc.greater(pc.list_value_length(questions["image_ids"]), 0),
            "solutions": pc.fill_null(num_solutions, 0),
        }
    )
    # By one thread: the order of several is not always the same.
    groups = counted.group_by(["modality", "difficulty"], use_threads=False)
    return groups.aggregate([([], "count_all"), ("with_image", "sum"), ("solutions", "sum")])


def sampling(
    solutions: pa.Table,
    steps: Steps,
    correct: Codes,
    groups: Mapping[str, Groups],
    resampling: Resampling,
) -> SamplingFigures:
    """Solutions asked for, drawn, rejected and there; questions that got fewer; answers, and the share of right ones.

    `correct` is RIGHT, WRONG or -1 (no answer) for each of the `solutions`, `groups` their groups.
    """
    requested = np.asarray(solutions["num_requested"], dtype=np.int64)
    complete = np.asarray(pc.list_value_length(solutions["solutions"]), dtype=np.int64)
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    errors = filter(None, solutions["error"].to_pylist())
    error_counts = Counter(map(error_kind, errors))
    right = (correct == RIGHT).astype(np.int64)
    # Accuracy by the answer's correctness would say nothing.
    groupings = dict(groups)
    groupings.pop("answer", None)
    # A question may have more than was asked for: it makes up for no other.
    num_missing = (requested - complete).clip(min=0)
    return SamplingFigures(
        questions=solutions.num_rows,
        requested=int(requested.sum()),
        kept=int(complete.sum()),
        drawn=int(pc.sum(solutions["num_drawn"]).as_py() or 0),
        rejected=_rejected(solutions),
        short_questions=int((complete < requested).sum()),
        empty_questions=int((complete == 0).sum()),
        missing=int(num_missing.sum()),
        without_answer=int((correct < 0).sum()),
        finish_reasons=_counts_by_value(flat.field("finish_reason")),
        errors=dict(error_counts),
        accuracy=stats_by_group(groupings, steps.question, right, 2, share_of_counts, resampling),
    )


def _rejected(solutions: pa.Table) -> dict[str, int]:
    """Samples that the quality filter refused, by reason."""
    counts = pc.list_flatten(solutions["rejected"].combine_chunks())
    kinds = counts.field("kind").to_pylist()
    numbers = counts.field("count").to_pylist()
    totals: Counter[str] = Counter()
    for kind, number in zip(kinds, numbers, strict=True):
        totals[kind] += number
    return dict(sorted(totals.items()))


def _counts_by_value(values: pa.Array) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    entries = pc.value_counts(values).to_pylist()
    # The sort is stable: of equal counts the value that came first stays first.
    entries.sort(key=lambda entry: -entry["counts"])
    counts = {}
    for entry in entries:
        counts[entry["values"]] = entry["counts"]
    return counts


def trees(solutions: pa.Table) -> TreeFigures:
    """What the trees found; nothing where there are none."""
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    lengths = np.asarray(pc.list_value_length(solutions["solutions"]))
    return TreeFigures(
        questions=int((lengths > 0).sum()),
        solutions=len(flat),
        right=pc.sum(flat.field("correct")).as_py() or 0,
    )


def step_counts(
    steps: Steps,
    usual: tuple[int, int],
    resampling: Resampling,
) -> StepCounts:
    """Steps a solution; `usual` are the fewest and the most steps of one that is not flagged."""
    fewest, most = usual
    # Sums by question: the interval resamples questions, as the solutions of one resemble each other.
    num_questions = int(steps.question.max(initial=-1)) + 1
    solutions_Q = np.bincount(steps.question, minlength=num_questions)
    steps_Q = np.bincount(steps.question, steps.length, minlength=num_questions)
    lengths, counts = np.unique(steps.length, return_counts=True)
    # Names of a JSON object are text.
    names = map(str, lengths.tolist())
    histogram = dict(zip(names, counts.tolist(), strict=True))
    return StepCounts(
        solutions=len(steps.length),
        steps=len(steps.solution),
        histogram=histogram,
        mean=ratio(steps_Q.astype(np.float64), solutions_Q.astype(np.float64), resampling),
        few=int((steps.length < fewest).sum()),
        many=int((steps.length > most).sum()),
    )
