"""Tables -> cases: one question with its samples as arrays, ready for `metrics`. Texts stay in Arrow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.stats import metrics
from medmm_ray.stats.metrics import Aggregate, Bools, Floats, Ints

Row = dict[str, Any]
LogOdds = dict[str, Floats]
"""By solution: the log-odds of each step."""
ARMS = ("text_only", "multimodal", "shuffled_image")


@dataclass(frozen=True)
class Case:
    """One question of the split; arrays over its M samples, rewards by arm (NaN: not scored)."""

    row: Row
    solution_ids: list[str]
    codes: Ints
    correct: Bools
    rewards: dict[str, Floats]
    seed: int


def of_questions(table: pa.Table, asked: pa.Table) -> pa.Table:
    return table.filter(pc.is_in(table["question_id"], asked["question_id"].combine_chunks()))


def list_entries(table: pa.Table, column: str, names: Sequence[str]) -> list[list[Row]]:
    """A list<struct> column as lists of dicts of the fields `names` only."""
    lists = table[column].combine_chunks()
    fields = [lists.flatten().field(name).to_pylist() for name in names]
    rows = [dict(zip(names, entry, strict=True)) for entry in zip(*fields, strict=True)]
    bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_pylist(), dtype=np.int64)])
    return [rows[start:end] for start, end in pairwise(bounds)]


def samples(solutions: pa.Table) -> dict[str, list[Row]]:
    """By question: the id, answer, correctness and number of steps of each of its solutions."""
    entries = list_entries(solutions, "solutions", ("solution_id", "answer", "correct"))
    lengths = iter(pc.list_value_length(solutions["solutions"].combine_chunks().flatten().field("steps")).to_pylist())
    rows = zip(solutions["question_id"].to_pylist(), entries, strict=True)
    return {question: [{**entry, "num_steps": next(lengths)} for entry in found] for question, found in rows}


def without_not_finite(scores: pa.Table) -> pa.Table:
    """Score rows of which those with NaN or infinity among their log-odds have the error ``not_finite``: they are no
    scores, and are counted with the other failed rows."""
    broken = np.zeros(scores.num_rows, dtype=bool)
    for name in ("text_log_odds", "image_log_odds"):
        lists = scores[name].combine_chunks()
        values = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.float64)
        owners = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        broken[owners[~np.isfinite(values)]] = True
    broken &= np.asarray(pc.is_null(scores["error"]), dtype=bool)
    if not broken.any():
        return scores
    fault = "not_finite: the row has scores that are no finite numbers; score the solution again"
    errors = pc.if_else(pa.array(broken), pa.scalar(fault), scores["error"])
    return scores.set_column(scores.schema.get_field_index("error"), "error", errors)


def step_log_odds(scores: pa.Table, sampled: Mapping[str, Sequence[Row]]) -> dict[str, LogOdds]:
    """By arm: text part + image part of each step, of the score rows without an error.

    Raises ValueError where a solution has another number of scores than steps.
    """
    num_steps = {row["solution_id"]: row["num_steps"] for found in sampled.values() for row in found}
    by_arm: dict[str, LogOdds] = {arm: {} for arm in scores["arm"].unique().to_pylist()}
    names = ("solution_id", "arm", "text_log_odds", "image_log_odds", "error")
    for solution, arm, text, image, error in zip(*(scores[name].to_pylist() for name in names), strict=True):
        if error or solution not in num_steps:
            continue
        if not len(text) == len(image) == num_steps[solution]:
            raise ValueError(
                f"solution {solution}, arm {arm}: {len(text)} text and {len(image)} image scores for "
                f"{num_steps[solution]} steps; expected one each a step. Score the solutions again."
            )
        by_arm[arm][solution] = np.asarray(text, dtype=np.float64) + np.asarray(image, dtype=np.float64)
    return by_arm


def rewards_of(solution_ids: Sequence[str], log_odds: Mapping[str, Floats], how: Aggregate) -> Floats:
    """The reward of each solution [M], NaN where it has no score."""
    steps = (log_odds.get(i) for i in solution_ids)
    return np.array([math.nan if x is None else metrics.aggregate(x, how) for x in steps], dtype=np.float64)


def make_cases(
    asked: pa.Table,
    sampled: Mapping[str, Sequence[Row]],
    log_odds: Mapping[str, LogOdds],
    arms: Sequence[str],
    how: Aggregate,
    seed: int,
) -> list[Case]:
    """One case a question of `asked`, in its order; without samples its arrays are empty."""
    cases = []
    for row in asked.to_pylist():
        found = sampled.get(row["question_id"], [])
        ids = [entry["solution_id"] for entry in found]
        graded = [entry["correct"] for entry in found] if row["answer_type"] == "open" else None
        codes = metrics.answer_codes([entry["answer"] for entry in found], graded)
        case = Case(
            row=row,
            solution_ids=ids,
            codes=codes,
            correct=np.array([bool(entry["correct"]) for entry in found], dtype=bool) & (codes >= 0),
            rewards={arm: rewards_of(ids, log_odds[arm], how) for arm in arms},
            seed=int(digest(seed, row["question_id"]), 16) % 2**40,
        )
        cases.append(case)
    return cases
