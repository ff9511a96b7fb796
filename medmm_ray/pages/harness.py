"""An evaluated run in the files of other tools: lm-evaluation-harness' results and samples, the hub's .eval_results.

A data set of the run is a task, a way to choose an answer a filter: ``one_sample`` (the mean over the samples),
``majority``, ``best_of_n_<arm>`` and ``sc_rm_<arm>`` at the report's largest N. ``exact_match`` of a sample is the
chance that the question is answered rightly, below 1 where that depends on which samples are drawn.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pyarrow as pa
import yaml
from pyarrow import NativeFile

from medmm_ray.config import JsonObject
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.steps.evaluate import EvaluationReport
from medmm_ray.steps.evaluate.accuracy import Accuracy, GroupAccuracy
from medmm_ray.text import question_with_options

METRIC = "exact_match"
STANDARD_ERRORS = 2 * 1.959964
"""Standard errors in a 95 % interval."""
UNNAMED = "questions"
"""The task of questions that name no data set."""


@dataclass(frozen=True)
class HarnessRun:
    """What is written: the report, the table of outcomes, who answered (`model`), and when (ISO 8601)."""

    report: EvaluationReport
    outcomes: pa.Table
    model: str
    date: str
    outcome_of: dict[str, JsonObject] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Looked up for each question while its solutions stream past.
        rows = {row["question_id"]: row for row in self.outcomes.to_pylist()}
        object.__setattr__(self, "outcome_of", rows)

    @property
    def columns(self) -> dict[str, str]:
        """By filter: the column of the outcomes that has its chances."""
        n = self.report.n
        columns = {"one_sample": "one_sample", "majority": f"majority/{n}"}
        for decoder in ("best_of_n", "sc_rm"):
            for arm in self.report.arms:
                columns[f"{decoder}_{arm}"] = f"{decoder}/{arm}/{n}"
        return columns


def write_lm_eval(folder: str, run: HarnessRun, questions: pa.Table, solutions: Iterable[pa.Table]) -> dict[str, int]:
    """``results_<date>.json`` and ``samples_<task>_<date>.jsonl`` in a folder; gives the lines by task.

    `solutions` come in parts, which are held only while they are written.
    """
    # A colon is no part of a file's name everywhere.
    stamp = run.date.replace(":", "-")
    question_of = {row["question_id"]: row for row in questions.to_pylist()}
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        streams: dict[str, NativeFile] = {}
        for part in solutions:
            for row in part.select(["question_id", "solutions"]).to_pylist():
                question = question_of.get(row["question_id"])
                # Questions of other splits were not evaluated.
                if question is None or row["question_id"] not in run.outcome_of:
                    continue
                task = question["dataset"] or UNNAMED
                if task not in streams:
                    fs, path = filesystem(f"{folder}/samples_{task}_{stamp}.jsonl")
                    streams[task] = stack.enter_context(fs.open_output_stream(path))
                first_doc = counts.get(task, 0) // len(run.columns)
                for sample in samples(
                    run,
                    question,
                    row["solutions"],
                    first_doc,
                ):
                    streams[task].write((json.dumps(sample, ensure_ascii=False) + "\n").encode())
                    counts[task] = counts.get(task, 0) + 1
    content = json.dumps(
        results(run),
        indent=2,
        ensure_ascii=False,
    ).encode()
    write_file(*filesystem(f"{folder}/results_{stamp}.json"), content)
    return counts


def samples(
    run: HarnessRun, question: JsonObject, solutions: Sequence[JsonObject], doc_id: int
) -> Iterator[JsonObject]:
    """The lines of one question, one for each filter."""
    outcome = run.outcome_of[question["question_id"]]
    doc = {name: question[name] for name in ("question_id", "question", "options", "answer", "answer_type", "dataset")}
    prompt = question_with_options(question["question"], question["options"])
    # All samples: what a filter leaves of them stands beside.
    texts = [solution["text"] for solution in solutions]
    shared = {
        "doc_id": doc_id,
        "doc": doc,
        "target": question["answer"],
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"n": len(texts)}}},
        "resps": [texts],
        "doc_hash": _hash(json.dumps(doc, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(question["answer"]),
        "metrics": [METRIC],
    }
    for filter_name, column in run.columns.items():
        answers = _answers(
            outcome,
            filter_name,
            solutions,
        )
        yield {**shared, "filter": filter_name, "filtered_resps": answers, METRIC: outcome[column]}


def _answers(outcome: JsonObject, filter_name: str, solutions: Sequence[JsonObject]) -> list[str]:
    """What a filter leaves: all answers of `one_sample`, else the chosen one, "" where there is none."""
    if filter_name == "one_sample":
        return [solution["answer"] or "" for solution in solutions]
    _, _, arm = filter_name.partition("best_of_n_")
    # Of a weighted vote the table of outcomes holds chances alone.
    if filter_name.startswith("sc_rm_"):
        return []
    return [outcome[f"answer/{arm or filter_name}"] or ""]


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def results(run: HarnessRun) -> JsonObject:
    """The content of ``results_<date>.json``."""
    report = run.report
    groups = report.by_dataset
    tasks = list(groups) or [UNNAMED]
    figures = {task: _task_figures(groups[task]) for task in groups} or {UNNAMED: _overall_figures(run)}
    sizes = {task: groups[task].questions for task in groups} or {UNNAMED: report.counts.questions}
    return {
        "results": figures,
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: _task_config(run, task) for task in tasks},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {METRIC: True} for task in tasks},
        "n-samples": {task: {"original": size, "effective": size} for task, size in sizes.items()},
        "config": {
            "model": "medmm_ray",
            "model_args": {"policy": run.model, "settings": report.settings},
            "bootstrap_iters": report.config["bootstrap_samples"],
        },
        "git_hash": report.environment.get("revision"),
        "date": run.date,
        "model_source": "medmm_ray",
        "model_name": run.model,
        "model_name_sanitized": run.model.replace("/", "__"),
    }


def _task_config(run: HarnessRun, task: str) -> JsonObject:
    return {
        "task": task,
        "test_split": run.report.counts.split,
        "output_type": "generate_until",
        "repeats": run.report.n,
        "num_fewshot": 0,
        "filter_list": [{"name": name} for name in run.columns],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def _task_figures(group: GroupAccuracy) -> JsonObject:
    by_filter = {"one_sample": group.one_sample, "majority": group.majority}
    for decoder, by_arm in (("best_of_n", group.best_of_n), ("sc_rm", group.sc_rm)):
        by_filter |= {f"{decoder}_{arm}": figure for arm, figure in by_arm.items()}
    return _with_errors(by_filter)


def _overall_figures(run: HarnessRun) -> JsonObject:
    accuracy, n = run.report.accuracy, str(run.report.n)
    by_filter = {"one_sample": accuracy.one_sample, "majority": accuracy.majority[n]}
    for decoder in ("best_of_n", "sc_rm"):
        by_filter |= {f"{decoder}_{arm}": by_n[n] for arm, by_n in accuracy.of(decoder).items()}
    return _with_errors(by_filter)


def _with_errors(by_filter: Mapping[str, Accuracy]) -> JsonObject:
    figures: JsonObject = {}
    for name, figure in by_filter.items():
        figures[f"{METRIC},{name}"] = figure.value
        # What the harness itself writes where it has no error.
        error: Any = "N/A"
        if figure.low is not None and figure.high is not None:
            error = (figure.high - figure.low) / STANDARD_ERRORS
        figures[f"{METRIC}_stderr,{name}"] = error
    return figures


def eval_results(run: HarnessRun, hub_ids: Mapping[str, str], source: str = "") -> dict[str, bytes]:
    """The hub's ``.eval_results/<task>.yaml`` files by name, of the tasks that have an id among the hub's data sets.

    The value is best-of-N's of the main arm, in percent, as the notes say; `source` is where the report can be seen.
    """
    report = run.report
    arm = "multimodal" if "multimodal" in report.arms else next(iter(report.arms), None)
    files = {}
    for task, group in report.by_dataset.items():
        # A data set without an id there has no leaderboard.
        if task not in hub_ids:
            continue
        figure = group.best_of_n[arm] if arm else group.majority
        how = f"best of {report.n} by a process reward model ({arm})" if arm else f"majority of {report.n}"
        interval = ""
        if figure.low is not None and figure.high is not None:
            interval = f", 95 % interval {100 * figure.low:.2f} to {100 * figure.high:.2f}"
        entry: JsonObject = {
            "dataset": {"id": hub_ids[task], "task_id": task},
            "value": round(100 * figure.value, 4),
            "date": run.date[:10],
            "notes": f"{how}{interval}; {group.questions} questions",
        }
        if source:
            entry["source"] = {"url": source, "name": "medmm_ray report"}
        files[f".eval_results/{task}.yaml"] = yaml.safe_dump([entry], sort_keys=False).encode()
    return files
