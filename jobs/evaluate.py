"""Everything -> report: report.json and report.html, in the artifact and at the top of the run's folder."""

import sys

import pyarrow as pa
import pyarrow.compute as pc

from jobs.entry import main
from jobs.graph import LABELS, STEPS
from jobs.step import Job, Run
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.engines.images import open_image
from medmm_ray.pages.report import headline, render
from medmm_ray.steps.audit import AuditReport
from medmm_ray.steps.evaluate import StepEntry, environment, evaluate


def run(job: Job) -> None:
    """Make the artifact `report`."""
    job.make_artifact("report", lambda uri: make(job, uri))


def make(job: Job, uri: str) -> dict[str, float]:
    """The report, in the folder `uri` and at the top of the run's; its headline figures."""
    # Solutions of training questions were learnt from: they are no part of what is measured.
    _, test_ids = job.solutions_of("test")
    solutions = job.read("solutions")
    dataset = read_report(job.run.uri("dataset_report"))
    report = evaluate(
        job.config,
        questions=job.read("questions"),
        images=job.read("images"),
        solutions=solutions.filter(pc.is_in(solutions["question_id"], pa.array(test_ids, pa.string()))),
        scores=job.read("scores"),
        labels=[job.read(name) for name in LABELS],
        review_queue=job.read("review_queue"),
        balances=dataset.balance,
        pairs=dataset.agreement,
        steps=_step_entries(job.run),
        environment=environment(),
    )
    files = {
        "report.json": to_json(report),
        "report.html": render(report, open_image).encode(),
    }
    for name, content in files.items():
        for folder in (uri, job.run.root):
            fs, path = filesystem(f"{folder}/{name}")
            write_file(fs, path, content)
    return {entry.kind: entry.figure.value for entry in headline(report)}


def _step_entries(run: Run) -> list[StepEntry]:
    """What each other step of the run made, and how long it took."""
    entries = []
    for step in STEPS:
        # This step's own manifest is written after the report.
        if step.name == "evaluate" or run.skipped(step):
            continue
        manifests = run.manifests(step)
        entries.append(
            StepEntry(
                name=step.name,
                rows=sum(manifest.rows for manifest in manifests),
                seconds=sum(manifest.seconds for manifest in manifests),
            )
        )
    return entries


def read_report(uri: str) -> AuditReport:
    """The dataset report in the artifact's folder."""
    fs, path = filesystem(f"{uri}/dataset_report.json")
    with fs.open_input_stream(path) as stream:
        return from_json(AuditReport, stream.read())


if __name__ == "__main__":
    sys.exit(main("evaluate"))
