"""The source's own solutions and labels as the run's tables: ``python -m jobs.import_labels recipe.yaml run=…``.

For data sets that bring them (med_prm, meds3, medmm, tables with steps): run the pipeline ``--until curate`` first. The
tables solutions, judge_labels, monte_carlo_labels, expert_labels, tree_solutions, tree_labels and evidence are written
in the places of the steps that would have made them, as far as the data set has something for them, so that the next
run of the pipeline goes on from there (with trees, where it is not ``without`` tree_search). Their manifests say that
they were imported; a table that the pipeline made is never replaced.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from jobs.entry import launch, parser, read_arguments
from jobs.graph import BY_NAME, LABELS, MAKER, TREES
from jobs.step import Job, Run
from medmm_ray.config import ConfigError
from medmm_ray.data.imported import ImportedRows, imported_policy, imported_rows
from medmm_ray.data.records import Evidence, ReviewItem, Solutions, Tree, to_arrow
from medmm_ray.data.sources import SOLVED, brings_solutions, load_solved
from medmm_ray.data.tables import Table, TableError, write_rows
from medmm_ray.steps.ingest import ReadSource, question_rows, read_source, reader_of, request_of

TABLES = ("solutions", *LABELS, *TREES, "evidence")
QUESTIONS_A_PART = 64
log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.import_labels``."""
    arguments = parser("import_labels", str(__doc__).splitlines()[0])
    return launch(arguments, words, _main)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(read_arguments(arguments, "ingest"))
    import_labels(run)
    return 0


def import_labels(run: Run) -> dict[str, int]:
    """Write the tables; gives the rows of each that was made."""
    sources = _solved_sources(run)
    tables = _open_tables(run)
    curated_ids = set(run.table("questions").to_arrow(["question_id"])["question_id"].to_pylist())
    # The sources are read as a stream: a part of each table is written before the next questions are read.
    num_dropped = 0
    filled: set[str] = set()
    rows = _rows(run, sources)
    while part := list(islice(rows, QUESTIONS_A_PART)):
        of_curated: dict[str, ImportedRows] = {}
        for question_id, row in part:
            if question_id in curated_ids:
                of_curated[question_id] = row
        num_dropped += len(part) - len(of_curated)
        filled |= _write(tables, of_curated)
    if num_dropped:
        log.info("%d questions of the source are not in the table questions: curate dropped them", num_dropped)
    num_rows: dict[str, int] = {}
    for name, table in tables.items():
        if name in filled:
            num_rows[name] = _finish(run, table, name, curated_ids)
        else:  # the data set has nothing for it: the pipeline makes it
            table.clear()
    # The steps that would have made these tables count as done only with all that they make.
    if "expert_labels" in num_rows:
        job = Job(run, BY_NAME["review"])
        write_rows(Table(run.uri("review_queue"), ReviewItem), [], job.origin("review_queue"), "question_id")
    if "tree_solutions" in num_rows:
        job = Job(run, BY_NAME["tree_search"])
        write_rows(Table(run.uri("trees"), Tree), [], job.origin("trees"), "question_id")
    return num_rows


def _open_tables(run: Run) -> dict[str, Table]:
    """The tables that are to be written, empty; raises `TableError` where the pipeline has made one of them."""
    tables = {}
    for name in TABLES:
        table = run.table(name)
        if not table.is_complete:
            tables[name] = table
        elif table.manifest().config != _imported_config(run):
            raise TableError(f"{table.uri} is there already; an import never replaces a table. Name another run=...")
    for table in tables.values():
        table.clear()  # of what an interrupted import left
        table.prepare()
    return tables


def _rows(run: Run, sources: Sequence[ReadSource]) -> Iterator[tuple[str, ImportedRows]]:
    """Each question's id and rows, in the order of the sources that bring solutions."""
    folder = f"{run.uri('raw_images')}/files"
    images = run.table("raw_images").to_arrow()
    config_hash = run.fingerprint(BY_NAME["sample"])
    tree_hash = run.fingerprint(BY_NAME["tree_search"])
    for source in sources:
        ids = [row.question_id for row in question_rows([source], images, folder)]
        policy = imported_policy(source.config.name)
        reader = load_solved(reader_of(source.config))
        for question_id, solved in zip(ids, reader.solved(request_of(source.config)), strict=True):
            yield question_id, imported_rows(question_id, solved, policy, config_hash, tree_hash)


def _solved_sources(run: Run) -> list[ReadSource]:
    """The sources of the recipe that bring solutions; a `ConfigError` where none does."""
    config = run.recipe.ingest
    solved = []
    for source in config.sources:
        if brings_solutions(request_of(source), reader_of(source)):
            solved.append(ReadSource(source, read_source(source, config.seed)))
    if not solved:
        names = ", ".join(config.names)
        raise ConfigError(
            f"none of ingest.sources ({names}) brings solutions; those that do: {', '.join(SOLVED)}, and tables whose "
            "columns have steps"
        )
    return solved


def _write(tables: dict[str, Table], rows: dict[str, ImportedRows]) -> set[str]:
    """One part of each table; gives the names of those that the data set has something for."""
    filled: set[str] = set()
    for name, table in tables.items():
        if name in ("solutions", "tree_solutions"):
            is_filled = _write_solutions(table, name, rows)
        elif name == "evidence":
            is_filled = _write_evidence(table, rows)
        else:
            is_filled = _write_labels(table, name, rows)
        if is_filled:
            filled.add(name)
    # One step makes both tables of trees: with the one the other counts as made, be it empty.
    if "tree_solutions" in filled:
        filled.add("tree_labels")
    return filled


def _write_solutions(table: Table, name: str, rows: dict[str, ImportedRows]) -> bool:
    solutions: list[Solutions] = [getattr(row, name) for row in rows.values()]
    table.write_part(to_arrow(Solutions, solutions), "question_id")
    return any(row.solutions for row in solutions)


def _write_evidence(table: Table, rows: dict[str, ImportedRows]) -> bool:
    evidence: list[Evidence] = []
    is_filled = False
    for question_id, row in rows.items():
        evidence.append(row.evidence or _no_evidence(question_id))
        is_filled |= row.evidence is not None
    table.write_part(to_arrow(Evidence, evidence), "question_id")
    return is_filled


def _write_labels(table: Table, name: str, rows: dict[str, ImportedRows]) -> bool:
    labels: dict[str, list[dict[str, Any]]] = {}
    for question_id, row in rows.items():
        labels[question_id] = [asdict(label) for label in row.labels.get(name, ())]
    table.write_part(_label_rows(labels, table.schema), "question_id", "labels")
    return any(labels.values())


def _label_rows(labels: dict[str, list[dict[str, Any]]], schema: pa.Schema) -> pa.Table:
    """A row a question with the list of its labels, as `Table.write_part` explodes it."""
    label_type = pa.struct(list(schema))
    question_ids = pa.array(list(labels), pa.string())
    lists = pa.array(list(labels.values()), pa.list_(label_type))
    return pa.table({"question_id": question_ids, "labels": lists})


def _imported_config(run: Run) -> dict[str, str]:
    """What the manifest of an imported table has in place of a step's config."""
    sources = run.recipe.ingest.sources
    return {
        "imported": ",".join(run.recipe.ingest.names),
        "path": ",".join(source.path for source in sources),
    }


def _no_evidence(question_id: str) -> Evidence:
    return Evidence(question_id=question_id, config_hash="", documents=[], images=[])


def _finish(run: Run, table: Table, name: str, question_ids: set[str]) -> int:
    job = Job(run, MAKER[name])
    origin = replace(job.origin(name), config=_imported_config(run))
    manifest = table.finish(origin, "question_id", question_ids, job.seconds(), run.recipe.max_error_rate)
    job.report(name, manifest)
    return manifest.rows


if __name__ == "__main__":
    sys.exit(main())
