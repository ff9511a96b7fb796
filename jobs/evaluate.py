"""Everything -> report: report.json and report.html, in the artifact and at the top of the run's folder."""

import json
import sys
from typing import Any

from jobs.graph import LABELS, STEPS
from jobs.step import Job, main
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.engines.images import open_image
from medmm_ray.pages.report import headline, render
from medmm_ray.steps.evaluate import environment, evaluate


def run(job: Job) -> None:
    job.make_artifact("report", lambda uri: make(job, uri))


def make(job: Job, uri: str) -> dict[str, float]:
    solutions, ids = job.read("solutions"), set(job.solutions_of("test")[1])
    made = [(step, job.run.manifests(step)) for step in STEPS if step.name != "evaluate" and not job.run.skipped(step)]
    report = evaluate(
        job.config,
        questions=job.read("questions"),
        images=job.read("images"),
        solutions=solutions.filter([i in ids for i in solutions["question_id"].to_pylist()]),
        scores=job.read("scores"),
        labels=[job.read(name) for name in LABELS],
        review_queue=job.read("review_queue"),
        dataset=read_report(job.run.uri("dataset_report")),
        steps=[
            {"name": step.name, "rows": sum(m.rows for m in manifests), "seconds": sum(m.seconds for m in manifests)}
            for step, manifests in made
        ],
        environment=environment(),
    )
    files = {
        "report.json": json.dumps(report, indent=1, allow_nan=False).encode(),
        "report.html": render(report, open_image).encode(),
    }
    for name, content in files.items():
        for place in (uri, job.run.root):
            fs, path = filesystem(f"{place}/{name}")
            write_file(fs, path, content)
    return {kind: figure["value"] for _, kind, figure in headline(report)}


def read_report(uri: str) -> dict[str, Any]:
    """The dataset report in the artifact's folder."""
    fs, path = filesystem(f"{uri}/dataset_report.json")
    with fs.open_input_stream(path) as stream:
        found: dict[str, Any] = json.loads(stream.read())
    return found


if __name__ == "__main__":
    sys.exit(main("evaluate"))
