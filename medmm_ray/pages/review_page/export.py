"""Verdicts as records, and how a growing set of them becomes a table that is written once.

`export_verdicts` writes the verdicts of the moment to a file that is named by the hash of its content. The review
step's setting ``review.verdicts`` names that hash: it is part of the step's fingerprint, so that labels, and all that
is trained on them, say which verdicts they hold; later verdicts make another export and another table beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from medmm_ray.config import digest
from medmm_ray.data.records import Labels, Question, QuestionReview, ReviewItem, StepLabel
from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.pages.review_page.item_views import question_content_hash, step_content_hash, step_item_id
from medmm_ray.pages.review_page.verdicts import UNSURE, Verdict, VerdictLog, latest_verdicts, parse
from medmm_ray.stats.grouped_stats import stats_by_group
from medmm_ray.stats.metrics import kappa_of_counts
from medmm_ray.stats.resampling import Resampling
from medmm_ray.stats.targets import ADJUDICATOR

NEUTRAL = "nothing to check"
RESAMPLING = Resampling(1000, 0)  # of the questions, for the interval of the readers' kappa

Verdicts = Mapping[str, Mapping[str, Verdict]]
"""Verdicts by item and reader."""


def log_uri(run: str, what: str) -> str:
    """Where the verdicts on `what` (steps, questions) of a run lie."""
    return f"{run}/reader_verdicts/{what}"


def _export_path(log: VerdictLog, name: str) -> str:
    return f"{log.path}/exports/{name}.jsonl"


def _name_of(verdicts: Sequence[Verdict]) -> str:
    """The hash that names an export of these verdicts."""
    return digest([asdict(verdict) for verdict in verdicts])


def export_verdicts(log: VerdictLog) -> tuple[str, int]:
    """Write the verdicts of the moment to an export; gives its name, a hash of its content, and how many they are."""
    verdicts = log.read()
    name = _name_of(verdicts)
    log.fs.create_dir(f"{log.path}/exports", recursive=True)
    lines = [json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts]
    write_file(
        log.fs,
        _export_path(log, name),
        "".join(lines).encode(),
    )
    return name, len(verdicts)


def read_export(uri: str, name: str) -> list[Verdict]:
    """The verdicts of the export `name` of the log at `uri`; a `TableError` where it is missing or was changed."""
    log = VerdictLog(uri)
    path = _export_path(log, name)
    fs, _ = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise TableError(f"{path} does not exist: python -m jobs.review_page recipe.yaml --export writes an export")
    with fs.open_input_stream(path) as stream:
        verdicts = parse(stream.read(), path)
    # The name is the hash: labels that name this export must rest on exactly its verdicts.
    if _name_of(verdicts) != name:
        raise TableError(f"{path} is not what was exported: its content has another hash. Export again")
    return verdicts


# Reviews of steps


def step_label(verdict: Verdict) -> StepLabel:
    """The verdict as a label: a step without anything to check is neutral; an unsure reader gives no label."""
    if verdict.verdict == UNSURE:
        # No reason either: a label with a reason and no value would train as a neutral step.
        return StepLabel()
    reason = verdict.feedback or None
    if verdict.verdict == "neutral":
        return StepLabel(confidence="high", reason=NEUTRAL if reason is None else f"{NEUTRAL}; {reason}")
    return StepLabel(
        label=int(verdict.verdict == "right"),
        confidence="high",
        logical=_passes(verdict, "logical"),
        medical=_passes(verdict, "medical"),
        image_grounded=_passes(verdict, "image_grounded"),
        reason=reason,
    )


def _passes(verdict: Verdict, test: str) -> bool | None:
    """Whether the step passes a test. A right one passes all; of a wrong one it is known where any fault is named."""
    if verdict.verdict == "right":
        return True
    return test not in verdict.faults if verdict.faults else None


def step_labels(
    verdicts: Sequence[Verdict],
    queue: Sequence[ReviewItem],
    questions: pa.Table,
    solutions: pa.Table,
) -> tuple[list[Labels], dict[str, float]]:
    """Each reader's, and the adjudicator's, labels of the queue's steps; with figures of the reading.

    Verdicts on another text, or on steps outside of the queue, are left out and counted (`left_out`).
    """
    question_rows = questions.select(["question_id", "question", "options"]).to_pylist()
    questions_by_id = {row["question_id"]: row for row in question_rows}
    steps_by_solution = _steps_of_queue(queue, solutions)
    by_item = latest_verdicts(verdicts)
    of_queue: dict[str, dict[str, Verdict]] = {}
    labels: dict[tuple[str, str], list[StepLabel]] = {}  # by solution and annotator
    for item in queue:
        steps = steps_by_solution[item.solution_id]
        question = questions_by_id[item.question_id]
        content_hash = step_content_hash(question["question"], question["options"], steps, item.step_index)
        item_id = step_item_id(item.solution_id, item.step_index)
        of_queue[item_id] = _on_content(by_item.get(item_id, {}), content_hash)
        for verdict in of_queue[item_id].values():
            key = (item.solution_id, _annotator(verdict))
            if key not in labels:
                labels[key] = [StepLabel() for _ in steps]
            labels[key][item.step_index] = step_label(verdict)
    return _label_rows(labels, queue), _figures(by_item, of_queue) | _kappa_readers(of_queue, queue)


def _steps_of_queue(queue: Sequence[ReviewItem], solutions: pa.Table) -> dict[str, list[str]]:
    """The steps of each solution that the queue names, by solution_id."""
    queued_ids = {item.solution_id for item in queue}
    steps = {}
    for row in solutions.select(["solutions"]).to_pylist():
        for solution in row["solutions"]:
            if solution["solution_id"] in queued_ids:
                steps[solution["solution_id"]] = solution["steps"]
    return steps


def _on_content(by_reader: Mapping[str, Verdict], content_hash: str) -> dict[str, Verdict]:
    """The verdicts on this content: a step that was written anew has to be read anew."""
    return {reader: verdict for reader, verdict in by_reader.items() if verdict.seen == content_hash}


def _annotator(verdict: Verdict) -> str:
    return ADJUDICATOR if verdict.adjudicates else verdict.reader


def _label_rows(labels: Mapping[tuple[str, str], list[StepLabel]], queue: Sequence[ReviewItem]) -> list[Labels]:
    """`labels`, by solution and annotator, as rows of the table of labels."""
    question_ids = {item.solution_id: item.question_id for item in queue}
    rows = []
    for (solution_id, annotator), steps in sorted(labels.items()):
        row = Labels(
            question_id=question_ids[solution_id],
            solution_id=solution_id,
            source="expert",
            annotator=annotator,
            steps=steps,
            cost=0.0,
        )
        rows.append(row)
    return rows


def _figures(by_item: Verdicts, of_queue: Verdicts) -> dict[str, float]:
    """How much was read; `by_item` has all verdicts, `of_queue` those on the queue's present steps."""
    verdicts: list[Verdict] = []
    num_readings: list[int] = []  # of each item, the adjudicator's apart
    for by_reader in of_queue.values():
        verdicts += by_reader.values()
        num_readings.append(sum(not verdict.adjudicates for verdict in by_reader.values()))
    num_unsure = 0
    readers: set[str] = set()
    for verdict in verdicts:
        num_unsure += verdict.verdict == UNSURE
        if not verdict.adjudicates:
            readers.add(verdict.reader)
    return {
        "queue": len(of_queue),
        "read": sum(number > 0 for number in num_readings),
        "read_twice": sum(number > 1 for number in num_readings),
        "adjudicated": len(verdicts) - sum(num_readings),
        "unsure": num_unsure,
        "left_out": sum(map(len, by_item.values())) - len(verdicts),
        "readers": len(readers),
        "verdicts": len(verdicts),
        "minutes": round(sum(verdict.seconds for verdict in verdicts) / 60, 1),
    }


def _kappa_readers(of_queue: Verdicts, queue: Sequence[ReviewItem]) -> dict[str, float]:
    """Cohen's kappa of two readers of a step, weighted by 1 / inclusion probability, with an interval by question.

    Over the steps that both call right or wrong; nothing where it is not defined.
    """
    items = {step_item_id(item.solution_id, item.step_index): item for item in queue}
    cells: list[int] = []  # of the table of two readers: 0 both wrong, 3 both right, 1 and 2 one of each
    question_ids: list[str] = []
    weights: list[float] = []
    for item_id, item in items.items():
        calls = _calls(of_queue[item_id])
        if len(calls) == 2:
            cells.append(2 * calls[0] + calls[1])
            question_ids.append(item.question_id)
            weights.append(1 / item.inclusion_probability)
    _, question = np.unique(question_ids, return_inverse=True)
    tables = stats_by_group(
        {},
        question,
        np.array(cells, dtype=np.int64),
        4,
        kappa_of_counts,
        RESAMPLING,
        np.array(weights),
    )
    figure = tables["all"].get("all")
    if figure is None or figure.value is None:
        return {}
    figures = {
        "kappa_readers": figure.value,
        "kappa_readers_steps": figure.count,
    }
    if figure.low is not None and figure.high is not None:
        figures |= {"kappa_readers_low": figure.low, "kappa_readers_high": figure.high}
    return figures


def _calls(by_reader: Mapping[str, Verdict]) -> list[bool]:
    """Whether the step is right, from each reader who calls it right or wrong, in the order of their names."""
    calls = []
    for _, verdict in sorted(by_reader.items()):
        if verdict.verdict in ("right", "wrong") and not verdict.adjudicates:
            calls.append(verdict.verdict == "right")
    return calls


# Reviews of questions


def question_reviews(verdicts: Sequence[Verdict], questions: Sequence[Question]) -> list[QuestionReview]:
    """Each reader's, and the adjudicator's, review of each question; of verdicts on the present text."""
    by_item = latest_verdicts(verdicts)
    reviews = []
    for question in questions:
        by_reader = _on_content(
            by_item.get(question.question_id, {}),
            question_content_hash(question),
        )
        for _, verdict in sorted(by_reader.items()):
            reviews.append(_question_review(verdict))
    return reviews


def _question_review(verdict: Verdict) -> QuestionReview:
    return QuestionReview(
        question_id=verdict.item_id,
        annotator=_annotator(verdict),
        keep=None if verdict.verdict == UNSURE else verdict.verdict == "keep",
        answer_right=verdict.answer_right,
        difficulty=verdict.difficulty,
        comment=verdict.feedback,
    )
