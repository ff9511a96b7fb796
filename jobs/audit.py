"""Whatever is there of questions, solutions and labels -> dataset_report.json and dataset_report.html.

As a step of the pipeline it makes the artifact `dataset_report`. Run by itself it needs questions and images only: in
the midst of labelling it reads the labels so far, says which tables are missing, and writes the report to the top of
the run's folder.
``--strict`` (or audit.gates=required) ends with an error where a gate fails.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
from pyarrow import fs as pafs
from rich.console import Console

from jobs.entry import launch, parser, read_arguments
from jobs.graph import ALL_LABELS, BY_NAME, STEPS
from jobs.recipe import Recipe
from jobs.step import Job, Run
from medmm_ray.data.json_documents import to_json
from medmm_ray.data.tables import Manifest, Table, filesystem, write_file
from medmm_ray.engines.llm.ledger import LEDGER_FILE, Ledger, LedgerFile
from medmm_ray.pages.dataset_page import render, summary
from medmm_ray.steps.audit import AuditReport, audit, require

STEP = BY_NAME["audit"]


def run(job: Job) -> None:
    """Make the artifact `dataset_report`."""
    job.make_artifact("dataset_report", lambda uri: make(job.run, uri))


def make(run: Run, uri: str) -> dict[str, float]:
    """The report, in the folder `uri` and at the top of the run's; its gates' figures.

    With gates "required" a failed gate raises after the report is written, so that the artifact stays incomplete.
    """
    report = report_of(run)
    write(report, uri, run.root)
    if run.recipe.audit.gates == "required":
        require(report.gates)
    return {gate.name: gate.value for gate in report.gates if gate.value is not None}


def report_of(run: Run) -> AuditReport:
    """The report of the tables of `run` that are complete, and of the labels so far."""
    tables: dict[str, Table] = {}
    complete: dict[str, Table] = {}
    for name in STEP.reads:
        if run.is_left_out(name):
            continue
        tables[name] = run.table(name)
        if tables[name].is_complete:
            complete[name] = tables[name]
    label_tables = [name for name in ALL_LABELS if name in tables]

    def parts(name: str, columns: Sequence[str] | None = None) -> Iterable[pa.Table]:
        return complete[name].stream(columns) if name in complete else ()

    return audit(
        run.recipe.audit,
        questions=run.table("questions").stream(),
        images=run.table("images").stream(["image_id", "sha256", "split", "modality"]),
        solutions=parts("solutions"),
        # Of labels in the making those so far are read.
        labels={name: tables[name].stream() for name in label_tables},
        tree_solutions=parts("tree_solutions"),
        review_queue=complete["review_queue"].to_arrow() if "review_queue" in complete else None,
        evidence=parts("evidence", ["question_id", "images"]),
        manifests=_manifests(run),
        ledgers=ledgers_of(run),
        missing=_missing(tables, label_tables),
    )


def _manifests(run: Run) -> dict[str, Manifest]:
    """The manifests of all that the steps before this one have completed."""
    manifests = {}
    for step in STEPS[: STEPS.index(STEP)]:
        if step.name in run.recipe.without:
            continue
        for name, output in run.outputs(step).items():
            if output.is_complete:
                manifests[name] = output.manifest()
    return manifests


def _missing(tables: Mapping[str, Table], label_tables: Sequence[str]) -> list[str]:
    """The names of tables that are not complete, with what there is of labels."""
    missing = []
    for name, table in tables.items():
        if table.is_complete:
            continue
        num_questions = table.rows_so_far() if name in label_tables else 0
        missing.append(f"{name} ({num_questions:,} questions so far)" if num_questions else name)
    return missing


def ledgers_of(run: Run) -> dict[str, Ledger]:
    """The ledgers of the run's APIs, by the folder of the model."""
    fs, path = filesystem(f"{run.root}/api")
    ledgers = {}
    for file in fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        if file.base_name == LEDGER_FILE:
            folder = file.path.removeprefix(path).removesuffix(f"/{LEDGER_FILE}")
            ledger = LedgerFile(f"{run.root}/api{folder}").read().ledger
            ledgers[folder.rpartition("/")[2]] = ledger
    return ledgers


def write(report: AuditReport, *folders: str) -> None:
    """The report as JSON and as a page, in each of the folders."""
    files = {
        "dataset_report.json": to_json(report),
        "dataset_report.html": render(report).encode(),
    }
    for name, content in files.items():
        for folder in folders:
            fs, path = filesystem(f"{folder}/{name}")
            write_file(fs, path, content)


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.audit``: the report of a run as it is; 1 where a gate must pass and fails."""
    arguments = parser("audit", STEP.what)
    arguments.add_argument("--strict", action="store_true", help="end with an error where a gate fails")
    return launch(arguments, words, _main, Recipe, "audit")


def _main(parsed: argparse.Namespace) -> int:
    run = Run(read_arguments(parsed, "audit"))
    report = report_of(run)
    write(report, run.root)
    Console().print(summary(report), f"\nreport: {run.root}/dataset_report.html")
    if parsed.strict or run.recipe.audit.gates == "required":
        require(report.gates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
