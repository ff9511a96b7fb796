"""Tables -> scored questions: one question with its samples as arrays, ready for `metrics`. Texts stay in Arrow."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.data.records import Question, from_dict
from medmm_ray.stats import decoders
from medmm_ray.stats.clusters import clusters_of, question_keys
from medmm_ray.stats.decoders import Aggregate
from medmm_ray.stats.metrics import Bools, Floats, Ints

LogOdds = Mapping[str, Floats]
"""By solution: the log-odds of each step."""
ARMS = ("text_only", "multimodal", "shuffled_image")


@dataclass(frozen=True)
class Sample:
    """One solution of a question, without its text."""

    solution_id: str
    answer: str | None
    correct: bool | None
    num_steps: int


class ArmScores(LogOdds):
    """One arm's log-odds of the steps of all scored solutions, in one array, and the rewards that they make."""

    def __init__(self, solution_ids: Sequence[str], log_odds_S: Floats, num_steps: Ints) -> None:
        # A solution that was scored twice counts as it was scored last.
        self._place = {solution_id: place for place, solution_id in enumerate(solution_ids)}
        self._log_odds_S = log_odds_S
        self._num_steps = num_steps
        self._ends = np.cumsum(num_steps)
        self._rewards: dict[Aggregate, Floats] = {}

    def __getitem__(self, solution_id: str) -> Floats:
        end = self._ends[self._place[solution_id]]
        return self._log_odds_S[end - self._num_steps[self._place[solution_id]] : end]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def places(self, solution_ids: Iterable[str]) -> Ints:
        """Where the rewards of these solutions are; -1 of those without a score."""
        return np.array([self._place.get(solution_id, -1) for solution_id in solution_ids], dtype=np.int64)

    def rewards(self, how: Aggregate) -> Floats:
        """The reward of each solution, by its place; the last entry, which place -1 stands for, is NaN."""
        if how not in self._rewards:
            # All at once: one by one, a test set of 350,000 solutions took most of the report's time.
            rewards = decoders.aggregates(
                self._log_odds_S,
                self._num_steps,
                how,
            )
            self._rewards[how] = np.append(rewards, math.nan)
        return self._rewards[how]


@dataclass(frozen=True)
class ScoredQuestion:
    """One question of the split; arrays over its M samples, rewards by arm (NaN: not scored)."""

    question: Question
    solution_ids: list[str]
    answers: list[str | None]
    codes: Ints
    """The number of each sample's answer among the answers of the question; negative without an answer."""
    correct: Bools
    places: dict[str, Ints]
    """By arm: where `ArmScores.rewards` has each sample's."""
    rewards: dict[str, Floats]
    seed: int

    @property
    def num_samples(self) -> int:
        """Samples of the question, scored or not."""
        return len(self.solution_ids)


def of_questions(table: pa.Table, questions: pa.Table) -> pa.Table:
    """The rows of `table` that belong to one of `questions`."""
    return table.filter(pc.is_in(table["question_id"], questions["question_id"].combine_chunks()))


def samples_by_question(solutions: pa.Table) -> dict[str, list[Sample]]:
    """By question: its solutions without their texts, in the order of the table of `Solutions`."""
    lists = solutions["solutions"].combine_chunks()
    flat = lists.flatten()
    samples = list(
        map(
            Sample,
            flat.field("solution_id").to_pylist(),
            flat.field("answer").to_pylist(),
            flat.field("correct").to_pylist(),
            pc.list_value_length(flat.field("steps")).to_pylist(),
        )
    )
    # Each question's samples lie between the end of the one before and its own.
    ends = np.cumsum(pc.list_value_length(lists).to_pylist(), dtype=np.int64)
    bounds = pairwise([0, *ends.tolist()])
    question_ids = solutions["question_id"].to_pylist()
    by_question = {}
    for question_id, (start, end) in zip(
        question_ids,
        bounds,
        strict=True,
    ):
        by_question[question_id] = samples[start:end]
    return by_question


def without_not_finite(scores: pa.Table) -> pa.Table:
    """Score rows of which those with NaN or infinity among their log-odds have the error ``not_finite``.

    They are no scores, and are counted with the other failed rows.
    """
    broken = np.zeros(scores.num_rows, dtype=bool)
    for name in ("text_log_odds", "image_log_odds"):
        lists = scores[name].combine_chunks()
        flat = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
        values = flat.astype(np.float64)
        row_of_value = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        broken[row_of_value[~np.isfinite(values)]] = True
    # A row that failed before keeps its own error.
    broken &= np.asarray(pc.is_null(scores["error"]), dtype=bool)
    if not broken.any():
        return scores
    fault = "not_finite: the row has scores that are no finite numbers; score the solution again"
    errors = pc.if_else(
        pa.array(broken),
        pa.scalar(fault),
        scores["error"],
    )
    place = scores.schema.get_field_index("error")
    return scores.set_column(
        place,
        "error",
        errors,
    )


def step_log_odds(scores: pa.Table, samples: Mapping[str, Sequence[Sample]]) -> dict[str, ArmScores]:
    """By arm: text part + image part of each step, of the score rows without an error.

    Raises ValueError where a solution has another number of scores than steps.
    """
    num_steps: dict[str, int] = {}
    for of_question in samples.values():
        for sample in of_question:
            num_steps[sample.solution_id] = sample.num_steps
    # A solution may have left the table since it was scored.
    is_there = pc.is_in(scores["solution_id"], pa.array(num_steps, pa.string()))
    usable = scores.filter(pc.and_(is_there, pc.is_null(scores["error"])))
    by_arm = {}
    # An arm whose rows all failed is an arm still: its questions count as unscored.
    for arm in scores["arm"].unique().to_pylist():
        rows = usable.filter(pc.equal(usable["arm"], arm))
        by_arm[arm] = _arm_scores(
            arm,
            rows,
            num_steps,
        )
    return by_arm


def _arm_scores(arm: str, rows: pa.Table, num_steps: Mapping[str, int]) -> ArmScores:
    solution_ids = rows["solution_id"].to_pylist()
    text_lists, image_lists = rows["text_log_odds"].combine_chunks(), rows["image_log_odds"].combine_chunks()
    num_text = np.asarray(pc.list_value_length(text_lists), dtype=np.int64)
    num_image = np.asarray(pc.list_value_length(image_lists), dtype=np.int64)
    expected = np.array([num_steps[solution_id] for solution_id in solution_ids], dtype=np.int64)
    # Both parts are checked: a sum of lists of another length would pair the wrong steps.
    misfits = np.flatnonzero((num_text != expected) | (num_image != expected))
    if misfits.size:
        row = int(misfits[0])
        raise ValueError(
            f"solution {solution_ids[row]}, arm {arm}: {num_text[row]} text and {num_image[row]} image scores for "
            f"{expected[row]} steps; expected one each a step. Score the solutions again."
        )
    text_S = np.asarray(text_lists.flatten(), dtype=np.float64)
    image_S = np.asarray(image_lists.flatten(), dtype=np.float64)
    return ArmScores(
        solution_ids,
        text_S + image_S,
        expected,
    )


@dataclass(frozen=True)
class SplitTables:
    """What there is of one split. `questions` are all of it, sorted by id; the rest is of those without an error.

    `scores` that are not finite have an error; `log_odds` are by arm.
    """

    split: str
    questions: pa.Table
    solutions: pa.Table
    scores: pa.Table
    samples: Mapping[str, Sequence[Sample]]
    log_odds: Mapping[str, ArmScores]

    @property
    def usable(self) -> pa.Table:
        """The questions without an error."""
        return self.questions.filter(pc.is_null(self.questions["error"]))


def split_tables(split: str, questions: pa.Table, solutions: pa.Table, scores: pa.Table) -> SplitTables:
    """The rows of one split of tables of several. Raises ValueError as `step_log_odds` does."""
    of_split = questions.filter(pc.equal(questions["split"], split)).sort_by("question_id")
    usable = of_split.filter(pc.is_null(of_split["error"]))
    solutions = of_questions(solutions, usable)
    scores = without_not_finite(of_questions(scores, usable))
    samples = samples_by_question(solutions)
    return SplitTables(
        split,
        of_split,
        solutions,
        scores,
        samples,
        step_log_odds(scores, samples),
    )


def scored_questions(measured: SplitTables, arms: Sequence[str], how: Aggregate, seed: int) -> list[ScoredQuestion]:
    """Each usable question with its samples and their rewards, by id; without samples its arrays are empty."""
    scored = []
    for row in measured.usable.to_pylist():
        question: Question = from_dict(Question, row)
        of_question = measured.samples.get(question.question_id, [])
        scored.append(
            _scored_question(
                question,
                of_question,
                measured.log_odds,
                arms,
                how,
                seed,
            )
        )
    return scored


def _scored_question(
    question: Question,
    samples: Sequence[Sample],
    log_odds: Mapping[str, ArmScores],
    arms: Sequence[str],
    how: Aggregate,
    seed: int,
) -> ScoredQuestion:
    ids, answers, grades = [], [], []
    for sample in samples:
        ids.append(sample.solution_id)
        answers.append(sample.answer)
        grades.append(sample.correct)
    # The wordings of an open answer differ: all that were graded right are one answer.
    codes = decoders.answer_codes(answers, grades if question.answer_type == "open" else None)
    # No answer is never right, whatever its grade.
    is_right = np.array(list(map(bool, grades)), dtype=bool)
    places = {arm: log_odds[arm].places(ids) for arm in arms}
    question_hash = digest(seed, question.question_id)
    return ScoredQuestion(
        question=question,
        solution_ids=ids,
        answers=answers,
        codes=codes,
        correct=is_right & (codes >= 0),
        places=places,
        # NaN keeps the sample's place among the N: it is drawn, and never the best.
        rewards={arm: log_odds[arm].rewards(how)[places[arm]] for arm in arms},
        seed=int(question_hash, 16) % 2**40,
    )


def clusters(questions: Sequence[ScoredQuestion]) -> Ints:
    """The cluster of each question: those about one image, or of one group, are not independent of each other."""
    return clusters_of([question_keys(scored.question.image_ids, scored.question.group) for scored in questions])
