"""Whatever is there of questions, solutions and labels -> dataset_report.json and dataset_report.html.

As a step of the pipeline it makes the artifact `dataset_report`. Run by itself it needs questions and images only: in
the midst of labelling it reads the labels so far, says which tables are missing, and writes the report to the top of
the run's folder.
``--strict`` (or audit.gates=required) ends with an error where a gate fails.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs
from rich.console import Console

from jobs.graph import BY_NAME, LABELS, STEPS
from jobs.recipe import Recipe
from jobs.step import Job, Run, launch, parser, read_arguments
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.pages.dataset_page import render, summary
from medmm_ray.steps.audit import audit, require

STEP = BY_NAME["audit"]


def run(job: Job) -> None:
    job.make_artifact("dataset_report", lambda uri: make(job.run, uri))


def make(run: Run, uri: str) -> dict[str, float]:
    """The report, in the folder `uri` and at the top of the run's; its gates' figures.

    With gates "required" a failed gate raises after the report is written, so that the artifact stays incomplete.
    """
    report = report_of(run)
    write(report, uri, run.root)
    if run.recipe.audit.gates == "required":
        require(report)
    return {gate["name"]: gate["value"] for gate in report["gates"] if gate["value"] is not None}


def report_of(run: Run) -> dict[str, Any]:
    """The report of the tables of `run` that are complete, and of the labels so far."""
    tables = {name: run.table(name) for name in STEP.reads if not run.is_left_out(name)}
    labels = [name for name in (*LABELS, "tree_labels") if name in tables]
    there = {name: table for name, table in tables.items() if table.is_complete}
    begun = {name: tables[name].rows_so_far() for name in labels if name not in there}
    earlier = [step for step in STEPS[: STEPS.index(STEP)] if step.name not in run.recipe.without]
    made = {name: out for step in earlier for name, out in run.outputs(step).items()}

    def parts(name: str) -> Iterable[pa.Table]:
        return there[name].stream() if name in there else ()

    return audit(
        run.recipe.audit,
        questions=run.table("questions").to_arrow(),
        images=run.table("images").to_arrow(),
        solutions=parts("solutions"),
        labels={name: tables[name].stream() for name in labels},
        tree_solutions=parts("tree_solutions"),
        review_queue=there["review_queue"].to_arrow() if "review_queue" in there else None,
        evidence=parts("evidence"),
        manifests={name: output.manifest() for name, output in made.items() if output.is_complete},
        ledgers=ledgers_of(run),
        missing=[
            f"{name} ({begun[name]:,} questions so far)" if begun.get(name) else name
            for name in tables
            if name not in there
        ],
    )


def ledgers_of(run: Run) -> dict[str, dict[str, Any]]:
    """The ledgers of the run's APIs, by the folder of the model."""
    fs, path = filesystem(f"{run.root}/api")
    found = {}
    for file in fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        if file.base_name == "ledger.json":
            with fs.open_input_stream(file.path) as stream:
                found[file.path.split("/")[-2]] = json.loads(stream.read())
    return found


def write(report: dict[str, Any], *folders: str) -> None:
    files = {
        "dataset_report.json": json.dumps(report, indent=1, allow_nan=False).encode(),
        "dataset_report.html": render(report).encode(),
    }
    for name, content in files.items():
        for folder in folders:
            fs, path = filesystem(f"{folder}/{name}")
            write_file(fs, path, content)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser("audit", STEP.what)
    arguments.add_argument("--strict", action="store_true", help="end with an error where a gate fails")
    return launch(arguments, words, _main, Recipe, "audit")


def _main(parsed: argparse.Namespace) -> int:
    run = Run(read_arguments(parsed, "audit"))
    report = report_of(run)
    write(report, run.root)
    Console().print(summary(report), f"\nreport: {run.root}/dataset_report.html")
    if parsed.strict or run.recipe.audit.gates == "required":
        require(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
