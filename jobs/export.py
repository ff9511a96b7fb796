"""A run's questions, solutions and labels as a dataset: ``python -m jobs.export recipe.yaml run=… to=<folder>``.

``format=json`` writes the published nested JSON, ``format=hf`` a folder for the Hugging Face hub, pushed with
``push=org/name``; ``format=lm_eval`` an evaluated run in the files of lm-evaluation-harness and of the hub. What the
run has is taken as it is: the tables questions and solutions must be complete; images, evidence, labels, scores, and
the trees' solutions and labels go along if they are.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from jobs.compare import read_run
from jobs.entry import launch, parser
from jobs.graph import ALL_LABELS, LABELS, MAKER, TREES
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError, load
from medmm_ray.data.datasets import data_sets
from medmm_ray.data.tables import Artifact, Table, filesystem, write_file
from medmm_ray.pages.harness import HarnessRun, eval_results, write_lm_eval
from medmm_ray.steps.export import ExportConfig, Tables, empty_folder, export, push

OPTIONAL = ("images", "evidence", "image_vectors", "scores", *LABELS, *TREES)
log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.export``."""
    arguments = parser("export", str(__doc__))
    return launch(arguments, words, _main, ExportConfig)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Overrides of the export's own settings; all others are the recipe's.
    export_overrides: list[str] = []
    recipe_overrides: list[str] = []
    for override in arguments.overrides:
        name, _, _ = override.partition("=")
        (export_overrides if name in ExportConfig.model_fields else recipe_overrides).append(override)
    config = load(ExportConfig, None, export_overrides)
    if config.push and config.format != "hf":
        raise ConfigError("push=... needs format=hf: the hub's folder is what is pushed")
    # The hub's client uploads files of this machine alone.
    if config.push and "://" in config.to:
        raise ConfigError(f"push=... needs a local folder, to={config.to} is none")
    run = Run(load_recipe([arguments.recipe, *recipe_overrides] if arguments.recipe else []))
    if not Artifact(run.root).exists:
        raise ConfigError(f"there is no run at {run.root}; 'run' names the output folder of a pipeline")
    if config.format == "lm_eval":
        counts = export_figures(run, config)
    else:
        tables = tables_of(run)
        counts = export(tables, config, _made_by(tables))
    # In the order of their names, so that two exports' lines can be compared.
    counted = [f"{number:,} {name}" for name, number in sorted(counts.items())]
    log.info("%s: %s", config.to, ", ".join(counted))
    if config.push:
        log.info("pushed: %s", push(config.to, config.push, config.private))
    return 0


def export_figures(run: Run, config: ExportConfig) -> dict[str, int]:
    """An evaluated run's figures in the files of other tools; the lines of samples by data set."""
    evaluated = read_run(run.root, run.root)
    manifest = run.artifact("report").manifest()
    harness = HarnessRun(evaluated.report, evaluated.outcomes, run.model_id("policy"), manifest.created)
    folder = empty_folder(config.to)
    counts = write_lm_eval(folder, harness, run.table("questions").to_arrow(), run.table("solutions").stream())
    hub_ids = {name: known.hub for name, known in data_sets().items() if known.hub} | config.hub_ids
    for name, content in eval_results(harness, hub_ids).items():
        fs, path = filesystem(f"{folder}/{name}")
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        write_file(fs, path, content)
    return {f"samples of {task}": number for task, number in counts.items()}


def _made_by(tables: Tables) -> dict[str, tuple[str, Any]]:
    """The fingerprint and the config that each table was made with, by its name."""
    present = {name: table for name, table in vars(tables).items() if isinstance(table, Table)}
    present |= dict(tables.labels)
    made_by = {}
    for name, table in present.items():
        manifest = table.manifest()
        made_by[name] = (manifest.fingerprint, manifest.config)
    return made_by


def tables_of(run: Run) -> Tables:
    """The run's tables that are complete; a `TableError` says that questions or solutions are not."""
    for name in ("questions", "solutions"):
        run.table(name).manifest()
    complete = {}
    for name in OPTIONAL:
        if run.table(name).is_complete:
            complete[name] = run.table(name)
        else:
            log.info("%s: not complete in this run (step %s), exported without it", name, MAKER[name].name)
    labels = {name: complete.pop(name) for name in ALL_LABELS if name in complete}
    return Tables(questions=run.table("questions"), solutions=run.table("solutions"), labels=labels, **complete)


if __name__ == "__main__":
    sys.exit(main())
