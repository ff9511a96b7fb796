"""Everything -> report.json, report.html, outcomes.parquet: in the artifact and at the top of the run's folder."""

import sys
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.entry import main
from jobs.graph import LABELS, STEPS
from jobs.placement import gpus_of_section
from jobs.step import Job, Run
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.engines.images import open_image
from medmm_ray.estimate.hardware import Hardware
from medmm_ray.pages.report import headline, render
from medmm_ray.steps.audit import AuditReport
from medmm_ray.steps.evaluate import VALIDATION, StepEntry, environment, evaluate

OUTCOMES = "outcomes.parquet"
"""What each question came to (`medmm_ray.steps.evaluate.outcomes`)."""


def run(job: Job) -> None:
    """Make the artifact `report`."""
    job.make_artifact("report", lambda uri: make(job, uri))


def make(job: Job, uri: str) -> dict[str, float]:
    """The report, in the folder `uri` and at the top of the run's; its headline figures."""
    questions = job.rows_where("questions", "split", [job.config.split, VALIDATION])
    question_ids = questions["question_id"].combine_chunks()
    dataset = None if job.run.is_left_out("dataset_report") else read_report(job.run.uri("dataset_report"))
    evaluation = evaluate(
        job.config,
        questions=questions,
        images=job.read("images", ["image_id", "uri", "diagnosis"]),
        solutions=job.rows_where("solutions", "question_id", question_ids),
        scores=job.rows_where("scores", "question_id", question_ids),
        labels=job.stream_all(LABELS),
        review_queue=job.read("review_queue"),
        balances=dataset.balance if dataset else (),
        pairs=dataset.agreement if dataset else (),
        steps=step_entries(job.run),
        settings=settings_of(job.run),
        environment=environment(),
    )
    report = evaluation.report
    table = pa.BufferOutputStream()
    pq.write_table(evaluation.outcomes, table)
    files = {
        "report.json": to_json(report),
        "report.html": render(report, open_image).encode(),
        OUTCOMES: table.getvalue().to_pybytes(),
    }
    for name, content in files.items():
        for folder in (uri, job.run.root):
            fs, path = filesystem(f"{folder}/{name}")
            write_file(fs, path, content)
    return {entry.kind: entry.figure.value for entry in headline(report)}


def settings_of(run: Run) -> dict[str, Any]:
    """By step: the settings that decide what it makes; and the checkpoints that the recipe names."""
    settings: dict[str, Any] = {}
    for step in STEPS:
        if not run.skipped(step):
            settings[step.name] = run.settings(step)
    settings["models"] = {name: model for name, model in dict(run.recipe.models).items() if model is not None}
    return settings


def step_entries(run: Run) -> list[StepEntry]:
    """What each other step of the run made, how long it took, what it cost and where it failed.

    GPU-hours are those of the pools that the recipe asks for, at the price of its section `plan`.
    """
    entries: list[StepEntry] = []
    plan = run.recipe.plan
    price = Hardware(gpu=plan.gpu, dollars_per_gpu_hour=plan.dollars_per_gpu_hour).price
    for step in STEPS:
        # This step's own manifest is written after the report.
        if step.name == "evaluate" or run.skipped(step):
            continue
        num_rows, seconds, cost = 0, 0.0, 0.0
        errors: Counter[str] = Counter()
        for manifest in run.manifests(step):
            num_rows += manifest.rows
            seconds += manifest.seconds
            cost += manifest.cost
            errors.update(manifest.errors)
        gpu_hours = gpus_of_section(run.section(step)) * seconds / 3600
        entry = StepEntry(
            name=step.name,
            rows=num_rows,
            seconds=seconds,
            cost=cost,
            errors=dict(errors),
            gpu_hours=gpu_hours,
            gpu_dollars=gpu_hours * price,
        )
        entries.append(entry)
    return entries


def read_report(uri: str) -> AuditReport:
    """The dataset report in the artifact's folder."""
    fs, path = filesystem(f"{uri}/dataset_report.json")
    with fs.open_input_stream(path) as stream:
        return from_json(AuditReport, stream.read())


if __name__ == "__main__":
    sys.exit(main("evaluate"))
