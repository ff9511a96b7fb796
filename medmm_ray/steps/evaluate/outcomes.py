"""What each question came to, as a table beside the report: the figures, question by question.

From it two runs are compared on the questions that both have, and anybody's own groups and tests are computed. Columns:
the question's id and what it is grouped by, its cluster, the gold answer, the answer that the majority and each arm's
best sample give (``answer/majority``, ``answer/<arm>``), and, by the path of each figure, the chance that the question
is answered rightly (``one_sample``, ``majority/8``, ``best_of_n/<arm>/8``, ``sc_rm/<arm>/8``, ``oracle/8``).
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from medmm_ray.stats import decoders
from medmm_ray.stats.metrics import Floats
from medmm_ray.steps.evaluate.accuracy import Chances
from medmm_ray.steps.evaluate.scored_questions import ScoredQuestion

COLUMNS = ("dataset", "difficulty", "modality", "answer_type", "published_type", "topic")
"""What a question is grouped by."""
ANSWER = "answer/"
"""Before the name of who gives an answer."""
NO_ANSWER = "none"
CHANCES = ("one_sample", "majority", "oracle", "best_of_n", "sc_rm")
"""First words of the columns with chances."""


def outcomes(questions: Sequence[ScoredQuestion], chances: Chances, arms: Sequence[str]) -> pa.Table:
    """One row a question, in the order of `questions`, which is that of the rows of `chances`."""
    columns: dict[str, pa.Array] = {}
    for name in ("question_id", *COLUMNS):
        columns[name] = pa.array([getattr(scored.question, name) for scored in questions], pa.string())
    columns["cluster"] = pa.array(chances.clusters_Q)
    columns["answer"] = pa.array([scored.question.answer for scored in questions], pa.string())
    columns[f"{ANSWER}majority"] = pa.array([_majority(scored) for scored in questions], pa.string())
    for arm in arms:
        columns[f"{ANSWER}{arm}"] = pa.array([_best(scored, arm) for scored in questions], pa.string())
    for path, values_Q in zip(
        chances.paths,
        chances.values_QK.T,
        strict=True,
    ):
        # Gains are differences of other columns.
        if path[0] in CHANCES:
            columns["/".join(path)] = pa.array(values_Q, pa.float64())
    return pa.table(columns)


def _majority(scored: ScoredQuestion) -> str | None:
    return _answer(scored, decoders.vote_of_codes(scored.codes))


def _best(scored: ScoredQuestion, arm: str) -> str | None:
    return _answer(scored, decoders.best_of_n(scored.rewards[arm]))


def _answer(scored: ScoredQuestion, place: int | None) -> str | None:
    """The answer of a sample, which is the gold one where it was graded right, however it is worded."""
    if place is None:
        return None
    # A right answer in other words would look like a wrong one beside the gold answer.
    if scored.correct[place]:
        return scored.question.answer
    return scored.answers[place]


def chance_columns(table: pa.Table) -> list[str]:
    """The columns of a table of outcomes that hold chances."""
    return [name for name in table.column_names if name.partition("/")[0] in CHANCES]


def chances_of(table: pa.Table, columns: Sequence[str]) -> Floats:
    """Some columns with chances, as an array [Q, K]."""
    return np.stack([table[name].to_numpy() for name in columns], axis=1)


def answer_table(table: pa.Table, arms: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """By answer type, right answer and chosen answer: questions. Open answers are too many to tabulate.

    The answer is that of best-of-N by the main arm, without an arm the majority's; "none" where there is none.
    """
    arm = "multimodal" if "multimodal" in arms else next(iter(arms), "majority")
    rows = zip(
        table["answer_type"].to_pylist(),
        table["answer"].to_pylist(),
        table[f"{ANSWER}{arm}"].to_pylist(),
        strict=True,
    )
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for answer_type, answer, chosen in rows:
        # Every wording would be a row of its own.
        if answer_type == "open":
            continue
        of_answer = counts.setdefault(answer_type, {}).setdefault(answer, {})
        name = chosen or NO_ANSWER
        of_answer[name] = of_answer.get(name, 0) + 1
    return {kind: dict(sorted(by_answer.items())) for kind, by_answer in sorted(counts.items())}
