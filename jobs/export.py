"""A run's questions, solutions and labels as a dataset: ``python -m jobs.export recipe.yaml run=… to=<folder>``.

``format=json`` writes the published nested JSON, ``format=hf`` a folder for the Hugging Face hub, pushed with
``push=org/name``. What the run has is taken as it is: the tables questions and solutions must be complete, images,
evidence, labels, and the trees' solutions and labels go along if they are.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.graph import LABELS, MAKER, TREES
from jobs.step import Run, launch, load_recipe, parser
from medmm_ray.config import ConfigError, load
from medmm_ray.data.tables import Table
from medmm_ray.steps.export import ExportConfig, Tables, export, push

OPTIONAL = ("images", "evidence", "image_vectors", *LABELS, *TREES)
log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser("export", str(__doc__))
    return launch(arguments, words, _main, ExportConfig)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mine = [word for word in arguments.overrides if word.partition("=")[0] in ExportConfig.model_fields]
    config = load(ExportConfig, None, mine)
    if config.push and config.format != "hf":
        raise ConfigError("push=... needs format=hf: the hub's folder is what is pushed")
    if config.push and "://" in config.to:
        raise ConfigError(f"push=... needs a local folder, to={config.to} is none")
    others = [word for word in arguments.overrides if word not in mine]
    run = Run(load_recipe([arguments.recipe, *others] if arguments.recipe else []))
    if "://" not in run.root and not Path(run.root).is_dir():
        raise ConfigError(f"there is no run at {run.root}; 'run' names the output folder of a pipeline")
    tables = tables_of(run)
    present = {name: table for name, table in vars(tables).items() if isinstance(table, Table)} | dict(tables.labels)
    made_by = {name: (m.fingerprint, m.config) for name, table in present.items() if (m := table.manifest())}
    counts = export(tables, config, made_by)
    log.info("%s: %s", config.to, ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items())))
    if config.push:
        log.info("pushed: %s", push(config.to, config.push, config.private))
    return 0


def tables_of(run: Run) -> Tables:
    """The run's tables that are complete; a `TableError` says that questions or solutions are not."""
    for name in ("questions", "solutions"):
        run.table(name).manifest()
    found = {name: table for name in OPTIONAL if (table := run.table(name)).is_complete}
    for name in OPTIONAL:
        if name not in found:
            log.info("%s: not complete in this run (step %s), exported without it", name, MAKER[name].name)
    labels = {name: found.pop(name) for name in (*LABELS, "tree_labels") if name in found}
    return Tables(questions=run.table("questions"), solutions=run.table("solutions"), labels=labels, **found)


if __name__ == "__main__":
    sys.exit(main())
