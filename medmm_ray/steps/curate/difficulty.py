"""An estimate of how hard a question is, where its data set does not say so.

It ranks questions of one modality by their form, and cuts the ranks by the shares of the framework's plan. It says
which of two questions looks harder, not how many answer it: the dataset report has right steps by difficulty.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from medmm_ray.config import digest
from medmm_ray.data.records import Question

SHARES = {"easy": 0.3, "medium": 0.5, "hard": 0.2}
"""Of the questions of a modality, in the order of their scores."""
_OF_TYPE = {"yes_no": 0.0, "choice": 1.0, "open": 1.5}
_REASONING = re.compile(
    r"\b(?:most likely|best next|next step|mechanism|why|diagnosis|prognosis|management|differential|underlying)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:except|not|least|incorrect|false)\b", re.IGNORECASE)


def score(question: Question) -> float:
    """A higher score looks harder: by the kind of answer, options, length, and words that ask for reasoning."""
    text = question.question
    # From 10 words to 20 says as much as from 50 to 100.
    length = math.log1p(len(text.split()))
    options = 0.25 * max(0, len(question.options) - 4)
    reasoning = 1.0 if _REASONING.search(text) or question.published_type == "reasoning" else 0.0
    negated = 0.5 if _NEGATED.search(text) else 0.0
    return _OF_TYPE.get(question.answer_type, 1.0) + 0.5 * length + options + reasoning + negated


def with_difficulties(questions: Sequence[Question], figures: Counter[str]) -> list[Question]:
    """The questions, those without a difficulty with an estimated one."""
    by_modality: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if not question.difficulty:
            by_modality[question.modality].append(question)
    estimates: dict[str, str] = {}
    for members in by_modality.values():
        # Equal scores are in the order of a hash: none of the orders in which questions come.
        ranked = sorted(members, key=lambda q: (score(q), digest("difficulty", q.question_id)))
        for rank, question in enumerate(ranked):
            estimates[question.question_id] = _at((rank + 0.5) / len(ranked))
    figures["difficulty_estimated"] = len(estimates)
    return [replace(q, difficulty=estimates.get(q.question_id, q.difficulty)) for q in questions]


def _at(share: float) -> str:
    """The difficulty of a question that so large a share of its modality is easier than."""
    total = 0.0
    for name, of_name in SHARES.items():
        total += of_name
        if share < total:
            return name
    return "hard"
