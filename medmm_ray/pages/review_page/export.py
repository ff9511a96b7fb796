"""Verdicts as records, and how a growing set of them becomes a table that is written once.

`freeze` writes the verdicts of the moment to a file that is named by the hash of its content. The review step's setting
``review.verdicts`` names that hash: it is part of the step's fingerprint, so that labels, and all that is trained on
them, say which verdicts they hold; later verdicts make another export and another table beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from medmm_ray.config import digest
from medmm_ray.data.records import Labels, QuestionReview, ReviewItem, StepLabel
from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.pages.review_page.cases import Row, seen_question, seen_step, step_item_id
from medmm_ray.pages.review_page.verdicts import FAULTS, UNSURE, Verdict, VerdictLog, parse, standing
from medmm_ray.stats.grouped_stats import Resampling, tabulate
from medmm_ray.stats.metrics import kappa_of_counts
from medmm_ray.stats.targets import ADJUDICATOR

NEUTRAL = "nothing to check"
RESAMPLING = Resampling(1000, 0)  # of the questions, for the interval of the readers' kappa


def log_uri(run: str, what: str) -> str:
    """Where the verdicts on `what` (steps, questions) of a run lie."""
    return f"{run}/reader_verdicts/{what}"


def _export_path(log: VerdictLog, name: str) -> str:
    return f"{log.path}/exports/{name}.jsonl"


def freeze(log: VerdictLog) -> tuple[str, int]:
    """Write the verdicts of the moment to an export; gives its name, a hash of its content, and how many they are."""
    verdicts = log.read()
    name = digest([asdict(verdict) for verdict in verdicts])
    log.fs.create_dir(f"{log.path}/exports", recursive=True)
    lines = "".join(json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
    write_file(log.fs, _export_path(log, name), lines.encode())
    return name, len(verdicts)


def frozen(uri: str, name: str) -> list[Verdict]:
    """The verdicts of the export `name` of the log at `uri`."""
    log = VerdictLog(uri)
    path = _export_path(log, name)
    fs, _ = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise TableError(f"{path} does not exist: python -m jobs.review_page recipe.yaml --export writes an export")
    with fs.open_input_stream(path) as stream:
        verdicts = parse(stream.read(), path)
    if digest([asdict(verdict) for verdict in verdicts]) != name:
        raise TableError(f"{path} is not what was exported: its content has another hash. Export again")
    return verdicts


def step_label(verdict: Verdict) -> StepLabel:
    """A verdict as a label: a step without anything to check is neutral; of an unsure reader's there is none.

    A right step passes the three tests; of a wrong one they are known where the reader ticked any.
    """
    if verdict.verdict == UNSURE:
        return StepLabel()
    reason = verdict.feedback or None
    if verdict.verdict == "neutral":
        return StepLabel(confidence="high", reason=NEUTRAL if reason is None else f"{NEUTRAL}; {reason}")
    right = verdict.verdict == "right"
    said = right or bool(verdict.faults)
    logical, medical, image_grounded = ((test not in verdict.faults) if said else None for test in FAULTS)
    return StepLabel(
        label=int(right), confidence="high", logical=logical, medical=medical, image_grounded=image_grounded,
        reason=reason,
    )  # fmt: skip


def step_labels(
    verdicts: Sequence[Verdict], queue: Sequence[ReviewItem], questions: pa.Table, solutions: pa.Table
) -> tuple[list[Labels], dict[str, float]]:
    """Each reader's, and the adjudicator's, labels of the queue's steps; with figures of the reading.

    Verdicts on another text, or on steps outside of the queue, are left out and counted (`left_out`).
    """
    asked = {row["question_id"]: row for row in questions.select(["question_id", "question", "options"]).to_pylist()}
    queued = {item.solution_id for item in queue}
    steps: dict[str, tuple[str, list[str]]] = {}
    for row in solutions.select(["question_id", "solutions"]).to_pylist():
        own = {s["solution_id"]: (row["question_id"], s["steps"]) for s in row["solutions"]}
        steps.update({key: value for key, value in own.items() if key in queued})
    found: dict[tuple[str, str], list[StepLabel]] = {}
    of_queue: dict[str, dict[str, Verdict]] = {}
    by_item = standing(verdicts)
    for item in queue:
        question_id, texts = steps[item.solution_id]
        seen = seen_step(asked[question_id], texts, item.step_index)
        item_id = step_item_id(item.solution_id, item.step_index)
        of_queue[item_id] = {r: v for r, v in by_item.get(item_id, {}).items() if v.seen == seen}
        for reader, verdict in of_queue[item_id].items():
            annotator = ADJUDICATOR if verdict.adjudicates else reader
            labels = found.setdefault((item.solution_id, annotator), [StepLabel() for _ in texts])
            labels[item.step_index] = step_label(verdict)
    rows = [
        Labels(
            question_id=steps[solution_id][0], solution_id=solution_id, source="expert", annotator=annotator,
            steps=labels, cost=0.0,
        )
        for (solution_id, annotator), labels in sorted(found.items())
    ]  # fmt: skip
    items = {step_item_id(item.solution_id, item.step_index): item for item in queue}
    return rows, _figures(by_item, of_queue) | _kappa_readers(of_queue, items)


def _figures(
    by_item: Mapping[str, Mapping[str, Verdict]], of_queue: Mapping[str, Mapping[str, Verdict]]
) -> dict[str, float]:
    kept = [verdict for of_item in of_queue.values() for verdict in of_item.values()]
    readings = [[v for v in of_item.values() if not v.adjudicates] for of_item in of_queue.values()]
    return {
        "queue": len(of_queue),
        "read": sum(map(bool, readings)),
        "read_twice": sum(len(of_item) > 1 for of_item in readings),
        "adjudicated": sum(v.adjudicates for v in kept),
        "unsure": sum(v.verdict == UNSURE for v in kept),
        "left_out": sum(map(len, by_item.values())) - len(kept),
        "readers": len({v.reader for of_item in readings for v in of_item}),
        "verdicts": len(kept),
        "minutes": round(sum(v.seconds for v in kept) / 60, 1),
    }


def _kappa_readers(of_queue: Mapping[str, Mapping[str, Verdict]], items: Mapping[str, ReviewItem]) -> dict[str, float]:
    """Cohen's kappa of two readers of a step, weighted by 1 / inclusion probability, with an interval by question.

    Over the steps that both call right or wrong; nothing where it is not defined.
    """
    cells: list[int] = []
    read: list[ReviewItem] = []
    for item_id, of_item in of_queue.items():
        words = [verdict.verdict for _, verdict in sorted(of_item.items()) if not verdict.adjudicates]
        sure = [word == "right" for word in words if word in ("right", "wrong")]
        if len(sure) == 2:
            cells.append(2 * sure[0] + sure[1])
            read.append(items[item_id])
    _, question = np.unique([item.question_id for item in read], return_inverse=True)
    weight = np.array([1 / item.inclusion_probability for item in read])
    tables = tabulate({}, question, np.array(cells, dtype=np.int64), 4, kappa_of_counts, RESAMPLING, weight)
    figure = tables["all"].get("all", {"value": None})
    if figure["value"] is None:
        return {}
    ends = {f"kappa_readers_{end}": figure[end] for end in ("low", "high") if figure[end] is not None}
    return {"kappa_readers": figure["value"], "kappa_readers_steps": figure["count"], **ends}


def question_reviews(verdicts: Sequence[Verdict], questions: Sequence[Row]) -> list[QuestionReview]:
    """Each reader's, and the adjudicator's, review of each question; of verdicts on the present text."""
    by_item = standing(verdicts)
    return [
        QuestionReview(
            question_id=question["question_id"],
            annotator=ADJUDICATOR if verdict.adjudicates else reader,
            keep=None if verdict.verdict == UNSURE else verdict.verdict == "keep",
            answer_right=verdict.answer_right,
            difficulty=verdict.difficulty,
            comment=verdict.feedback,
        )
        for question in questions
        for reader, verdict in sorted(by_item.get(question["question_id"], {}).items())
        if verdict.seen == seen_question(question)
    ]
