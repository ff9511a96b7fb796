"""What was asked of the policy and what came: coverage, solutions a question, answers, and steps a solution."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.tables import error_kind
from medmm_ray.stats.grouped_stats import Groups, Resampling, ratio, share_of_counts, stats_by_group
from medmm_ray.stats.label_arrays import RIGHT, Codes, Steps

Row = dict[str, Any]
DIFFICULTIES = ("easy", "medium", "hard")


def easy_first(name: str) -> tuple[int, str]:
    return (DIFFICULTIES.index(name) if name in DIFFICULTIES else len(DIFFICULTIES), name)


def coverage(questions: pa.Table, images: pa.Table, found: pa.Table) -> Row:
    """Questions by split, and by modality: questions by difficulty, those with an image, images, solutions of all
    sources.
    """
    usable = questions.filter(pc.is_null(questions["error"]))
    solutions: Counter[str] = Counter()
    for question_id, number in zip(
        found["question_id"].to_pylist(), pc.list_value_length(found["solutions"]).to_pylist(), strict=True
    ):
        solutions[question_id] += number
    seen = Counter(images["modality"].to_pylist())
    modalities: dict[str, Row] = {}
    columns = (usable[name].to_pylist() for name in ("question_id", "modality", "difficulty", "image_ids"))
    for question_id, modality, difficulty, image_ids in zip(*columns, strict=True):
        row = modalities.setdefault(
            modality,
            {"questions": 0, "with_image": 0, "images": seen[modality], "solutions": 0, "by_difficulty": Counter()},
        )
        row["questions"] += 1
        row["with_image"] += bool(image_ids)
        row["solutions"] += solutions[question_id]
        row["by_difficulty"][difficulty] += 1
    return {
        "questions": usable.num_rows,
        "images": images.num_rows,
        "splits": dict(sorted(Counter(usable["split"].to_pylist()).items())),
        "difficulties": sorted({d for row in modalities.values() for d in row["by_difficulty"]}, key=easy_first),
        "modalities": {
            name: {**row, "by_difficulty": dict(row["by_difficulty"])} for name, row in sorted(modalities.items())
        },
    }


def _rejected(sampled: pa.Table) -> dict[str, int]:
    """Samples that the quality filter refused, by reason."""
    counts = pc.list_flatten(sampled["rejected"].combine_chunks())
    totals: Counter[str] = Counter()
    for kind, number in zip(counts.field("kind").to_pylist(), counts.field("count").to_pylist(), strict=True):
        totals[kind] += number
    return dict(sorted(totals.items()))


def sampling(
    sampled: pa.Table, steps: Steps, correct: Codes, groups: Mapping[str, Groups], resampling: Resampling
) -> Row:
    """Solutions asked for, drawn, rejected and kept; questions that got fewer; answers, and the share of right ones."""
    asked = np.asarray(sampled["num_requested"], dtype=np.int64)
    kept = np.asarray(pc.list_value_length(sampled["solutions"]), dtype=np.int64)
    flat = pc.list_flatten(sampled["solutions"].combine_chunks())
    faults = [error_kind(error) for error in sampled["error"].to_pylist() if error]
    right = (correct == RIGHT).astype(np.int64)
    groupings = {name: group for name, group in groups.items() if name != "answer"}
    return {
        "questions": sampled.num_rows,
        "requested": int(asked.sum()),
        "kept": int(kept.sum()),
        "drawn": int(pc.sum(sampled["num_drawn"]).as_py() or 0),
        "rejected": _rejected(sampled),
        "short_questions": int((kept < asked).sum()),
        "empty_questions": int((kept == 0).sum()),
        "missing": int((asked - kept).clip(min=0).sum()),
        "without_answer": int((correct < 0).sum()),
        "finish_reasons": _counted(flat.field("finish_reason")),
        "errors": dict(Counter(faults)),
        "accuracy": stats_by_group(groupings, steps.question, right, 2, share_of_counts, resampling),
    }


def trees(grown: pa.Table) -> Row:
    """What the trees found, where there are any: questions with a solution, solutions, and right ones."""
    flat = pc.list_flatten(grown["solutions"].combine_chunks())
    return {
        "questions": int((np.asarray(pc.list_value_length(grown["solutions"])) > 0).sum()),
        "solutions": len(flat),
        "right": pc.sum(flat.field("correct")).as_py() or 0,
    }


def _counted(values: pa.Array) -> dict[str, int]:
    counts = ((entry["values"], entry["counts"]) for entry in pc.value_counts(values).to_pylist())
    return dict(sorted(counts, key=lambda pair: -pair[1]))


def step_counts(steps: Steps, usual: tuple[int, int], resampling: Resampling) -> Row:
    """Steps a solution: histogram, mean with its interval, and how many solutions have fewer or more than `usual`."""
    num_questions = int(steps.question.max(initial=-1)) + 1
    solutions_Q = np.bincount(steps.question, minlength=num_questions)
    steps_Q = np.bincount(steps.question, steps.length, minlength=num_questions)
    numbers, counts = np.unique(steps.length, return_counts=True)
    return {
        "solutions": len(steps.length),
        "steps": len(steps.solution),
        "histogram": {str(number): int(count) for number, count in zip(numbers, counts, strict=True)},
        "mean": ratio(steps_Q.astype(np.float64), solutions_Q.astype(np.float64), resampling),
        "few": int((steps.length < usual[0]).sum()),
        "many": int((steps.length > usual[1]).sum()),
    }
