"""Tables -> scored questions: one question with its samples as arrays, ready for `metrics`. Texts stay in Arrow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.data.records import Question, from_dict
from medmm_ray.stats import decoders
from medmm_ray.stats.decoders import Aggregate
from medmm_ray.stats.metrics import Bools, Floats, Ints

LogOdds = dict[str, Floats]
"""By solution: the log-odds of each step."""
ARMS = ("text_only", "multimodal", "shuffled_image")


@dataclass(frozen=True)
class Sample:
    """One solution of a question, without its text."""

    solution_id: str
    answer: str | None
    correct: bool | None
    num_steps: int


@dataclass(frozen=True)
class ScoredQuestion:
    """One question of the split; arrays over its M samples, rewards by arm (NaN: not scored)."""

    question: Question
    solution_ids: list[str]
    codes: Ints
    """The number of each sample's answer among the answers of the question; negative without an answer."""
    correct: Bools
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
    for question_id, (start, end) in zip(question_ids, bounds, strict=True):
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
    errors = pc.if_else(pa.array(broken), pa.scalar(fault), scores["error"])
    place = scores.schema.get_field_index("error")
    return scores.set_column(place, "error", errors)


def step_log_odds(scores: pa.Table, samples: Mapping[str, Sequence[Sample]]) -> dict[str, LogOdds]:
    """By arm: text part + image part of each step, of the score rows without an error.

    Raises ValueError where a solution has another number of scores than steps.
    """
    num_steps: dict[str, int] = {}
    for of_question in samples.values():
        for sample in of_question:
            num_steps[sample.solution_id] = sample.num_steps
    # An arm whose rows all failed is an arm still: its questions count as unscored.
    by_arm: dict[str, LogOdds] = {arm: {} for arm in scores["arm"].unique().to_pylist()}
    rows = zip(
        scores["solution_id"].to_pylist(),
        scores["arm"].to_pylist(),
        scores["text_log_odds"].to_pylist(),
        scores["image_log_odds"].to_pylist(),
        scores["error"].to_pylist(),
        strict=True,
    )
    for solution_id, arm, text, image, error in rows:
        # A solution may have left the table since it was scored.
        if error or solution_id not in num_steps:
            continue
        if not len(text) == len(image) == num_steps[solution_id]:
            raise ValueError(
                f"solution {solution_id}, arm {arm}: {len(text)} text and {len(image)} image scores for "
                f"{num_steps[solution_id]} steps; expected one each a step. Score the solutions again."
            )
        text_S = np.asarray(text, dtype=np.float64)
        image_S = np.asarray(image, dtype=np.float64)
        by_arm[arm][solution_id] = text_S + image_S
    return by_arm


def rewards_of(solution_ids: Sequence[str], log_odds: Mapping[str, Floats], how: Aggregate) -> Floats:
    """The reward of each solution [M], NaN where it has no score."""
    # NaN keeps the sample's place among the N: it is drawn, and never the best.
    rewards_M = np.full(len(solution_ids), math.nan)
    for place, solution_id in enumerate(solution_ids):
        if solution_id in log_odds:
            rewards_M[place] = decoders.aggregate(log_odds[solution_id], how)
    return rewards_M


def scored_questions(
    questions: pa.Table,
    samples: Mapping[str, Sequence[Sample]],
    log_odds: Mapping[str, LogOdds],
    arms: Sequence[str],
    how: Aggregate,
    seed: int,
) -> list[ScoredQuestion]:
    """Each of `questions` with its samples and their rewards, in their order; without samples its arrays are empty."""
    scored = []
    for row in questions.to_pylist():
        question: Question = from_dict(Question, row)
        of_question = samples.get(question.question_id, [])
        ids, answers, grades = [], [], []
        for sample in of_question:
            ids.append(sample.solution_id)
            answers.append(sample.answer)
            grades.append(sample.correct)
        # The wordings of an open answer differ: all that were graded right are one answer.
        codes = decoders.answer_codes(answers, grades if question.answer_type == "open" else None)
        # No answer is never right, whatever its grade.
        is_right = np.array(list(map(bool, grades)), dtype=bool)
        rewards = {arm: rewards_of(ids, log_odds[arm], how) for arm in arms}
        question_hash = digest(seed, question.question_id)
        scored.append(
            ScoredQuestion(
                question=question,
                solution_ids=ids,
                codes=codes,
                correct=is_right & (codes >= 0),
                rewards=rewards,
                seed=int(question_hash, 16) % 2**40,
            )
        )
    return scored
