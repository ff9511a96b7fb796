"""What was asked of the policy and what came: coverage, solutions a question, answers, and steps a solution."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.tables import error_kind
from medmm_ray.stats.grouped_stats import (
    CountedFigure,
    GroupedCounts,
    GroupedStats,
    Groups,
    RatioCounts,
    easy_first,
    share_of_counts,
)
from medmm_ray.stats.label_arrays import RIGHT, Codes, Ints, Steps
from medmm_ray.stats.resampling import Resampling


@dataclass(frozen=True)
class SolvedQuestions:
    """Solutions without texts with their steps, whether each is right, and the groups that it belongs to."""

    table: pa.Table
    steps: Steps
    correct: Codes
    """RIGHT, WRONG, or -1 where no answer was found."""
    groups: Mapping[str, Groups]
    cluster_Q: Ints
    """The cluster of each question."""


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


class CoverageCounts:
    """Coverage, counted some questions at a time."""

    def __init__(self, groups: Iterable[tuple[str, str]], images: Counter[str]) -> None:
        """`groups` are the modalities and difficulties of usable questions, in the order in which they are shown;
        `images` the images by modality: counted once, as not every image has a question."""
        self._num_images = images.total()
        self._modalities: dict[str, ModalityCounts] = {}
        self._difficulties: set[str] = set()
        self._splits: Counter[str] = Counter()
        for modality, difficulty in groups:
            self._difficulties.add(difficulty)
            if modality not in self._modalities:
                self._modalities[modality] = ModalityCounts(0, 0, images[modality], 0, {})
            self._modalities[modality].by_difficulty[difficulty] = 0

    def add(self, questions: pa.Table, solutions: pa.Table) -> None:
        """Count questions that were not there before, and their solutions."""
        usable = questions.filter(pc.is_null(questions["error"]))
        self._splits.update(usable["split"].to_pylist())
        for group in _groups(usable, solutions).to_pylist():
            counts = self._modalities[group["modality"]]
            counts.questions += group["count_all"]
            counts.with_image += group["with_image_sum"]
            counts.solutions += group["solutions_sum"]
            counts.by_difficulty[group["difficulty"]] += group["count_all"]

    def figures(self) -> Coverage:
        """Questions by split, and by modality: questions by difficulty, with an image, images, and solutions."""
        return Coverage(
            questions=self._splits.total(),
            images=self._num_images,
            splits=dict(sorted(self._splits.items())),
            difficulties=sorted(self._difficulties, key=easy_first),
            modalities=dict(sorted(self._modalities.items())),
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


class SamplingCounts:
    """What was asked for and what came, counted some questions at a time."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._accuracy = GroupedCounts(2)

    def add(self, solved: SolvedQuestions) -> None:
        """Count the solutions of questions that were not there before."""
        solutions, correct = solved.table, solved.correct
        requested = np.asarray(solutions["num_requested"], dtype=np.int64)
        complete = np.asarray(pc.list_value_length(solutions["solutions"]), dtype=np.int64)
        flat = pc.list_flatten(solutions["solutions"].combine_chunks())
        errors = filter(None, solutions["error"].to_pylist())
        self._errors.update(map(error_kind, errors))
        self._finish_reasons.update(flat.field("finish_reason").to_pylist())
        self._count_rejected(solutions)
        # A question may have more than was asked for: it makes up for no other.
        num_missing = (requested - complete).clip(min=0)
        self._counts["questions"] += solutions.num_rows
        self._counts["requested"] += int(requested.sum())
        self._counts["kept"] += int(complete.sum())
        self._counts["drawn"] += int(pc.sum(solutions["num_drawn"]).as_py() or 0)
        self._counts["short_questions"] += int((complete < requested).sum())
        self._counts["empty_questions"] += int((complete == 0).sum())
        self._counts["missing"] += int(num_missing.sum())
        self._counts["without_answer"] += int((correct < 0).sum())
        # Accuracy by the answer's correctness would say nothing.
        groupings = dict(solved.groups)
        groupings.pop("answer", None)
        is_right = (correct == RIGHT).astype(np.int64)
        self._accuracy.add(groupings, solved.steps.question, is_right, cluster_Q=solved.cluster_Q)

    def _count_rejected(self, solutions: pa.Table) -> None:
        counts = pc.list_flatten(solutions["rejected"].combine_chunks())
        kinds = counts.field("kind").to_pylist()
        for kind, number in zip(kinds, counts.field("count").to_pylist(), strict=True):
            self._rejected[kind] += number

    def figures(self, resampling: Resampling) -> SamplingFigures:
        """Solutions asked for, drawn, rejected and there; questions that got fewer; the share of right answers."""
        counts = self._counts
        return SamplingFigures(
            questions=counts["questions"],
            requested=counts["requested"],
            kept=counts["kept"],
            drawn=counts["drawn"],
            rejected=dict(sorted(self._rejected.items())),
            short_questions=counts["short_questions"],
            empty_questions=counts["empty_questions"],
            missing=counts["missing"],
            without_answer=counts["without_answer"],
            # Of equally frequent ones that first which came first.
            finish_reasons=dict(self._finish_reasons.most_common()),
            errors=dict(self._errors),
            accuracy=self._accuracy.stats(share_of_counts, resampling),
        )


def tree_figures(parts: Iterable[pa.Table]) -> TreeFigures:
    """What the trees found; nothing where there are none."""
    num_questions = num_solutions = num_right = 0
    for solutions in parts:
        flat = pc.list_flatten(solutions["solutions"].combine_chunks())
        lengths = np.asarray(pc.list_value_length(solutions["solutions"]))
        num_questions += int((lengths > 0).sum())
        num_solutions += len(flat)
        num_right += pc.sum(flat.field("correct")).as_py() or 0
    return TreeFigures(questions=num_questions, solutions=num_solutions, right=num_right)


class StepCounter:
    """Steps a solution, counted some questions at a time."""

    def __init__(self) -> None:
        self._lengths: Counter[int] = Counter()
        self._mean = RatioCounts()

    def add(self, steps: Steps, cluster_Q: Ints) -> None:
        """Count the solutions of questions that were not there before; `cluster_Q` has the cluster of each."""
        # Sums by question: the interval resamples clusters of them, as the solutions of one resemble each other.
        num_questions = int(steps.question.max(initial=-1)) + 1
        solutions_Q = np.bincount(steps.question, minlength=num_questions)
        steps_Q = np.bincount(steps.question, steps.length, minlength=num_questions)
        self._mean.add(steps_Q.astype(np.float64), solutions_Q.astype(np.float64), cluster_Q)
        self._lengths.update(steps.length.tolist())

    def figures(
        self,
        usual: tuple[int, int],
        resampling: Resampling,
    ) -> StepCounts:
        """Steps a solution; `usual` are the fewest and the most steps of one that is not flagged."""
        fewest, most = usual
        by_length = sorted(self._lengths.items())
        return StepCounts(
            solutions=self._lengths.total(),
            steps=sum(length * count for length, count in by_length),
            # Names of a JSON object are text.
            histogram={str(length): count for length, count in by_length},
            mean=self._mean.figure(resampling),
            few=sum(count for length, count in by_length if length < fewest),
            many=sum(count for length, count in by_length if length > most),
        )
