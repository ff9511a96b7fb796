"""Written questions, and what readers said of questions."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medmm_ray.stats.targets import ADJUDICATOR
from medmm_ray.steps.curate.config import CurateConfig


def reviewed(
    questions: pa.Table,
    written: pa.Table,
    reviews: pa.Table | None,
    config: CurateConfig,
) -> pa.Table:
    """Raw questions with the written ones that `config` takes; what readers reject gets an error.

    Of several readers the adjudicator counts, else the majority; where they are even, a written question is rejected
    and the source's own stays. The difficulty becomes the readers'.
    """
    verdicts = _verdicts(reviews)
    rows = questions.to_pylist()
    if config.written != "none":
        for row in written.to_pylist():
            verdict = verdicts.get(row["question_id"])
            is_unread = verdict is None or verdict.keep is None
            if is_unread and config.written == "reviewed":
                row["error"] = "question_review: no reader has kept it"
            rows.append(row)
    with_reviews = []
    for row in rows:
        verdict = verdicts.get(row["question_id"])
        with_reviews.append(_with_review(row, verdict))
    return pa.Table.from_pylist(with_reviews, questions.schema)


@dataclass(frozen=True)
class _Verdict:
    """What the readers of a question say together; None where they say nothing."""

    keep: bool | None
    difficulty: str | None


def _with_review(row: dict[str, Any], verdict: _Verdict | None) -> dict[str, Any]:
    # A row that failed before keeps its own error.
    if verdict is None or row["error"]:
        return row
    error = None
    if verdict.keep is False:
        error = "question_review: readers reject it"
    difficulty = verdict.difficulty or row["difficulty"]
    return row | {"error": error, "difficulty": difficulty}


def _verdicts(reviews: pa.Table | None) -> dict[str, _Verdict]:
    """The readers' verdict on each question that they read."""
    if reviews is None:
        return {}
    by_question: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reviews.to_pylist():
        by_question[row["question_id"]].append(row)
    verdicts = {}
    for question_id, rows in by_question.items():
        verdicts[question_id] = _verdict(rows)
    return verdicts


def _verdict(rows: Sequence[dict[str, Any]]) -> _Verdict:
    """The adjudicator's word, or the majority of all; of an even vote none."""
    # The adjudicator has the last word: beside his, other reviews do not count.
    counting = [row for row in rows if row["annotator"] == ADJUDICATOR] or rows
    balance = 0
    difficulties: Counter[str] = Counter()
    for row in counting:
        if row["difficulty"]:
            difficulties[row["difficulty"]] += 1
        if row["keep"] is None:
            continue
        # Whoever keeps a question but calls its answer wrong does not keep it as it is.
        keeps = row["keep"] and row["answer_right"] is not False
        balance += 1 if keeps else -1
    most_common = difficulties.most_common(1)
    return _Verdict(
        keep=balance > 0 if balance else None,
        difficulty=most_common[0][0] if most_common else None,
    )
