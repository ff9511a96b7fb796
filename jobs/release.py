"""The release of a run: ``python -m jobs.release recipe.yaml run=… [push=org/name]``.

Leaves ``<run>/release``: the reward model and the dataset with their cards, a datasheet, reports, figures, the release
list, and checksums. It is public unless ``private=true`` says otherwise, and then a source that may not be passed on
ends it: leave it out (``exclude=[name]``). What no run can know is asked, and answered by name
(``release.answers.purpose="…"``). The same command again changes nothing; ``push`` sends it to the hub.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from jobs.compare import read_run
from jobs.entry import launch, parser, read_arguments
from jobs.evaluate import read_report
from jobs.export import tables_of
from jobs.graph import BY_NAME, MAKER
from jobs.recipe import Recipe, judge_name, judges
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.data.tables import Artifact, Manifest
from medmm_ray.release import Evaluation, FinishedRun, ReleaseConfig, make, push

log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.release``."""
    return launch(parser("release", str(__doc__)), words, _main, Recipe, "release")


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = read_arguments(arguments, "release")
    run, config = Run(recipe), recipe.release
    folder = config.to.rstrip("/") or f"{run.root}/release"
    check(run, config, folder)
    release = make(folder, finished(run, config), config)
    log.info("%s: %s", folder, "complete already" if release.was_complete else "made")
    for item in release.items:
        if item.state != "yes":
            log.info("%s: %s%s", item.what, item.state, f" ({item.detail})" if item.detail else "")
    for name, question in release.open_questions.items():
        log.info("release.answers.%s: %s", name, question)
    if config.push:
        for address in push(release, config):
            log.info("pushed: %s", address)
    return 0


def check(run: Run, config: ReleaseConfig, folder: str) -> None:
    """Raise `ConfigError` where a run cannot be released as the settings say."""
    if not Artifact(run.root).exists:
        raise ConfigError(f"there is no run at {run.root}; 'run' names the output folder of a pipeline")
    if config.push and "://" in folder:
        raise ConfigError(f"release.push needs a local folder, {folder} is none; name one with release.to=...")
    if config.push and config.push.count("/") != 1:
        raise ConfigError(f"release.push is {config.push!r}; a repository of the hub is named org/name")
    given = run.given("two_tower")
    if "model" in config.parts and given is not None:
        raise ConfigError(
            f"the run's scorer is {given}, which it was given and did not train; release the rest with "
            "release.parts=[dataset]"
        )


def finished(run: Run, config: ReleaseConfig) -> FinishedRun:
    """What of the run is released; a `TableError` or `ConfigError` says what is not complete."""
    manifests: dict[str, Manifest] = {}
    for name in MAKER:
        output = run.artifact(name)
        if run.given(name) is None and output.is_complete:
            manifests[name] = output.manifest()
    releases_model = "model" in config.parts
    evaluation = None
    if releases_model:
        evaluated = read_run(run.uri("report"), run.root)
        created = run.artifact("report").manifest().created
        evaluation = Evaluation(report=evaluated.report, outcomes=evaluated.outcomes, created=created)
    return FinishedRun(
        name=run.root.rpartition("/")[2],
        tables=tables_of(run),
        manifests=manifests,
        ingest=run.recipe.ingest,
        models=models(run),
        checkpoint=run.model("two_tower") if releases_model else None,
        evaluation=evaluation,
        audit=read_report(run.uri("dataset_report")) if "dataset_report" in manifests else None,
    )


def models(run: Run) -> dict[str, str]:
    """Who wrote, judged and scored the solutions."""
    names = {"policy": run.policy_id(BY_NAME["sample"])}
    for section, judge in judges(run.recipe).items():
        names[section.replace("_", " ")] = judge_name(judge)
    return names | {"scorer": run.model_id("two_tower")}


if __name__ == "__main__":
    sys.exit(main())
