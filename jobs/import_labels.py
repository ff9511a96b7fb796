"""The source's own solutions and labels as the run's tables: ``python -m jobs.import_labels recipe.yaml run=…``.

For a data set that brings them (ingest.source med_prm, meds3, medmm): run the pipeline ``--until curate`` first. The
tables solutions, judge_labels, monte_carlo_labels, expert_labels, tree_solutions, tree_labels and evidence are written
in the places of the steps that would have made them, as far as the data set has something for them, so that the next
run of the pipeline goes on from there (with trees, where it is not ``without`` tree_search). Their manifests say that
they were imported; a table that the pipeline made is never replaced.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from jobs.graph import BY_NAME, LABELS, MAKER, TREES
from jobs.step import Job, Run, launch, parser, read_arguments
from medmm_ray.data.imported import ImportedRows, imported_policy, imported_rows
from medmm_ray.data.records import Evidence, ReviewItem, Solutions, Tree, to_arrow
from medmm_ray.data.sources import SolvedQuestion, load_solved
from medmm_ray.data.tables import Table, TableError, write_rows
from medmm_ray.steps.ingest import question_rows, read_source, request_of

TABLES = ("solutions", *LABELS, *TREES, "evidence")
QUESTIONS_A_PART = 64
log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser("import_labels", str(__doc__).splitlines()[0])
    return launch(arguments, words, _main)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(read_arguments(arguments, "ingest"))
    import_labels(run)
    return 0


def import_labels(run: Run) -> dict[str, int]:
    """Write the tables; gives the rows of each that was made."""
    source = load_solved(run.recipe.ingest.source)
    tables = {name: table for name in TABLES if not (table := run.table(name)).is_complete}
    for table in (run.table(name) for name in TABLES if name not in tables):
        if table.manifest().config != _said(run):
            raise TableError(f"{table.uri} is there already; an import never replaces a table. Name another run=...")
    wanted = set(run.table("questions").to_arrow(["question_id"])["question_id"].to_pylist())
    _clear(tables.values())
    for table in tables.values():
        table.prepare()
    dropped = 0
    used: set[str] = set()
    rows = _rows(run, source.solved(request_of(run.recipe.ingest)))
    while part := list(islice(rows, QUESTIONS_A_PART)):
        kept = {question_id: row for question_id, row in part if question_id in wanted}
        dropped += len(part) - len(kept)
        used |= _write(tables, kept)
    if dropped:
        log.info("%d questions of the source are not in the table questions: curate dropped them", dropped)
    _clear(table for name, table in tables.items() if name not in used)
    made = {name: _finish(run, table, name, wanted) for name, table in tables.items() if name in used}
    if "expert_labels" in made:
        job = Job(run, BY_NAME["review"])
        write_rows(Table(run.uri("review_queue"), ReviewItem), [], job.origin("review_queue"), "question_id")
    if "tree_solutions" in made:
        job = Job(run, BY_NAME["tree_search"])
        write_rows(Table(run.uri("trees"), Tree), [], job.origin("trees"), "question_id")
    return made


def _clear(tables: Iterable[Table]) -> None:
    """Drop what an interrupted import left, or what the data set has nothing for: the pipeline makes those."""
    for table in tables:
        for stale in table.parts():
            table.fs.delete_file(stale)


def _rows(run: Run, solved: Iterator[SolvedQuestion]) -> Iterator[tuple[str, ImportedRows]]:
    """Each question's id and rows, in the order of the source."""
    config = run.recipe.ingest
    data = read_source(config)
    folder = f"{run.uri('raw_images')}/files"
    ids = [row.question_id for row in question_rows(data, run.table("raw_images").to_arrow(), config, folder)]
    config_hash, tree_hash = (run.fingerprint(BY_NAME[name]) for name in ("sample", "tree_search"))
    for question_id, found in zip(ids, solved, strict=True):
        yield question_id, imported_rows(question_id, found, imported_policy(config.source), config_hash, tree_hash)


def _write(tables: dict[str, Table], rows: dict[str, ImportedRows]) -> set[str]:
    """One part of each table; gives the names of those that the data set has something for."""
    used = set()
    for name, table in tables.items():
        if name == "solutions":
            table.write_part(to_arrow(Solutions, [row.solutions for row in rows.values()]), "question_id")
            something = any(row.solutions.solutions for row in rows.values())
        elif name == "tree_solutions":
            table.write_part(to_arrow(Solutions, [row.tree_solutions for row in rows.values()]), "question_id")
            something = any(row.tree_solutions.solutions for row in rows.values())
        elif name == "evidence":
            evidence = [row.evidence or _no_evidence(key) for key, row in rows.items()]
            table.write_part(to_arrow(Evidence, evidence), "question_id")
            something = any(row.evidence for row in rows.values())
        else:
            found = {key: [asdict(label) for label in row.labels.get(name, ())] for key, row in rows.items()}
            table.write_part(_exploded(found, table.schema), "question_id", "labels")
            something = any(found.values())
        used |= {name} if something else set()
    return used | ({"tree_labels"} if "tree_solutions" in used else set())  # one step makes both


def _exploded(found: dict[str, list[dict[str, Any]]], schema: pa.Schema) -> pa.Table:
    labels = pa.array(list(found.values()), pa.list_(pa.struct(list(schema))))
    return pa.table({"question_id": pa.array(list(found), pa.string()), "labels": labels})


def _said(run: Run) -> dict[str, str]:
    """What the manifest of an imported table has in place of a step's config."""
    return {"imported": run.recipe.ingest.source, "path": run.recipe.ingest.path}


def _no_evidence(question_id: str) -> Evidence:
    return Evidence(question_id=question_id, config_hash="", documents=[], images=[])


def _finish(run: Run, table: Table, name: str, wanted: set[str]) -> int:
    job = Job(run, MAKER[name])
    origin = replace(job.origin(name), config=_said(run))
    manifest = table.finish(origin, "question_id", wanted, job.seconds(), run.recipe.max_error_rate)
    job.report(name, manifest)
    return manifest.rows


if __name__ == "__main__":
    sys.exit(main())
