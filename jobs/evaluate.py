"""Everything -> report: report.json and report.html, in the artifact and at the top of the run's folder."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

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
    questions = _rows_where(job, "questions", "split", [job.config.split])
    # Solutions of training questions were learnt from: they are no part of what is measured.
    test_ids = questions.filter(pc.equal(questions["split"], "test"))["question_id"].combine_chunks()
    dataset = read_report(job.run.uri("dataset_report"))
    report = evaluate(
        job.config,
        questions=questions,
        images=job.read("images", ["image_id", "uri", "diagnosis"]),
        solutions=_rows_where(job, "solutions", "question_id", test_ids),
        scores=_rows_where(job, "scores", "question_id", test_ids),
        labels=chain.from_iterable(_parts(job, name) for name in LABELS),
        review_queue=job.read("review_queue"),
        balances=dataset.balance,
        pairs=dataset.agreement,
        steps=step_entries(job.run),
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


def _parts(job: Job, name: str) -> Iterable[pa.Table]:
    """A table's rows part by part; none where its step is left out."""
    return () if job.run.is_left_out(name) else job.table(name).stream()


def _rows_where(job: Job, name: str, column: str, values: Sequence[str] | pa.Array) -> pa.Table:
    """The rows of a table with one of `values` in a column: they alone are held, whatever the size of the table."""
    rows = [job.table(name).schema.empty_table()]
    for part in _parts(job, name):
        is_among = pc.is_in(part[column], pa.array(values, pa.string()))
        rows.append(part.filter(is_among))
    return pa.concat_tables(rows)


def step_entries(run: Run) -> list[StepEntry]:
    """What each other step of the run made, how long it took, what it cost and where it failed."""
    entries: list[StepEntry] = []
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
        entry = StepEntry(
            name=step.name,
            rows=num_rows,
            seconds=seconds,
            cost=cost,
            errors=dict(errors),
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
