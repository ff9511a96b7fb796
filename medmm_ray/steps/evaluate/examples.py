"""Cases worth a look: a question, its images, and the solutions that the scorers chose, step by step."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.stats import metrics
from medmm_ray.steps.evaluate.cases import Case, Row
from medmm_ray.steps.evaluate.steps import Labels

Parts = Mapping[str, tuple[list[float], list[float]]]
"""By solution: the text and the image part of each step's log-odds."""


def choose_examples(
    cases: Sequence[Case],
    arms: Sequence[str],
    solutions: pa.Table,
    images: pa.Table,
    scores: pa.Table,
    truth: Labels,
    *,
    num_examples: int,
    seed: int,
) -> list[Row]:
    """`num_examples` cases, in turn of three kinds, within a kind by the hash of their id.

    rescued: the scorer's choice is right, the text-only one's wrong; missed: its choice is wrong although a right
    answer was there; agreed: both are right. The scorer is the multimodal arm, or the first one where there is none.
    """
    if not arms:
        return []
    main = "multimodal" if "multimodal" in arms else arms[0]
    kinds: dict[str, list[Case]] = {"rescued": [], "missed": [], "agreed": []}
    for case in sorted(cases, key=lambda case: digest(seed, "example", case.row["question_id"])):
        kind = _kind(case, main)
        if kind:
            kinds[kind].append(case)
    turns = [(kind, of[i]) for i in range(len(cases)) for kind, of in kinds.items() if i < len(of)][:num_examples]
    ids = pa.array([case.row["question_id"] for _, case in turns], pa.string())
    texts = solutions.filter(pc.is_in(solutions["question_id"], ids)).to_pylist()
    by_question = {row["question_id"]: row["solutions"] for row in texts}
    mine = pc.and_(pc.is_in(scores["question_id"], ids), pc.equal(scores["arm"], main))
    scored = scores.filter(mine).to_pylist()
    parts = {row["solution_id"]: (row["text_log_odds"], row["image_log_odds"]) for row in scored}
    pictures = {row["image_id"]: row for row in images.select(["image_id", "uri", "diagnosis"]).to_pylist()}
    keep = ("question_id", "question", "options", "answer", "answer_type", "difficulty", "modality")
    return [
        {
            "kind": kind,
            **{name: case.row[name] for name in keep},
            "images": [pictures[i] for i in case.row["image_ids"] if i in pictures],
            "share_right": round(float(case.correct.mean()), 6),
            "solutions": [
                _solution(by_question[case.row["question_id"]][i], roles, float(case.rewards[main][i]), parts, truth)
                for i, roles in _shown(case, main).items()
            ],
        }
        for kind, case in turns
    ]


def _kind(case: Case, main: str) -> str | None:
    chosen = metrics.best_of_n(case.rewards[main])
    if chosen is None:
        return None
    if not case.correct[chosen]:
        return "missed" if case.correct.any() else None
    by_text = metrics.best_of_n(case.rewards["text_only"]) if "text_only" in case.rewards else None
    return "rescued" if by_text is not None and not case.correct[by_text] else "agreed"


def _shown(case: Case, main: str) -> dict[int, list[str]]:
    """At most three samples with their roles: each scorer's choice, and the best one of the other truth."""
    shown: dict[int, list[str]] = {}
    for arm in dict.fromkeys((main, "text_only")):
        chosen = metrics.best_of_n(case.rewards[arm]) if arm in case.rewards else None
        if chosen is not None:
            shown.setdefault(chosen, []).append(f"chosen_{arm}")
    first = next(iter(shown))
    others = np.where(case.correct == case.correct[first], math.nan, case.rewards[main])
    contrast = metrics.best_of_n(others)
    if contrast is not None:
        shown.setdefault(contrast, []).append("best_wrong" if case.correct[first] else "best_right")
    return {i: roles for i, roles in shown.items() if not math.isnan(case.rewards[main][i])}


def _solution(solution: Row, roles: Sequence[str], reward: float, parts: Parts, truth: Labels) -> Row:
    ident = solution["solution_id"]
    labels = truth.get(ident) or [None] * len(solution["steps"])
    steps = [
        {
            "text": text,
            "probability": round(float(metrics.probability(by_text + by_image)), 6),
            "text_log_odds": round(by_text, 4),
            "image_log_odds": round(by_image, 4),
            "truth": label,
        }
        for text, by_text, by_image, label in zip(solution["steps"], *parts[ident], labels, strict=True)
    ]
    return {
        "solution_id": ident,
        "roles": list(roles),
        "answer": solution["answer"],
        "correct": bool(solution["correct"]),
        "reward": round(float(metrics.probability(reward)), 6),
        "steps": steps,
    }
