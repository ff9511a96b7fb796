"""Benchmarks by name: ``python -m jobs.evaluate_on medqa,pubmedqa data=FOLDER policy=MODEL scorer=MODEL n=64 run=RUN``.

The first word names data sets (python -m jobs.datasets lists them) or the table of a paper (med_prm, meds3, mirage,
medical_vqa, visualprocessbench, processbench, prmbench), whose recipe is then taken if there is one. The policy writes
n solutions a question, the reward model scores them, and one table has the benchmarks by row: this run, the runs in
``baselines=[RUN, …]`` and published figures, marked as theirs. Benchmarks of reward models bring their own solutions:
no policy is asked. Leaves ``benchmarks.html``, ``.md`` and ``.json`` in the run's folder, beside its report.

Any other name=value is the recipe's; ``--dry-run`` says what it would take. Run again, it goes on where it was.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field
from rich.console import Console

from jobs.compare import read_run
from jobs.entry import guarded
from jobs.graph import BY_NAME, steps_between
from jobs.import_labels import import_labels
from jobs.pipeline import run_pipeline
from jobs.plan import print_plan
from jobs.recipe import Recipe
from jobs.settings_help import all_settings
from jobs.step import Run, load_recipe
from medmm_ray.config import Config, ConfigError, load
from medmm_ray.data.datasets import data_sets
from medmm_ray.data.json_documents import to_json
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.pages.benchmark_page import markdown, render, summary
from medmm_ray.steps.evaluate.benchmark_table import BenchmarkTable, benchmark_table, table_of
from medmm_ray.steps.evaluate.published import TABLES, PublishedTable

RECIPES = Path(__file__).parent / "recipes"
BASE = "benchmarks.yaml"
FIGURES_ONLY = ("score", "evaluate")
"""What is left to do where a benchmark brings its solutions and the labels of their steps."""


class EvaluateOnConfig(Config):
    """What is measured on the benchmarks, and where they lie."""

    data: str = ""
    """Folder or URI with a folder for each data set, by its name. Required."""
    paths: dict[str, str] = Field({})
    """Data sets that lie elsewhere: {medqa: <folder>}."""
    policy: str = ""
    """The model that writes solutions; empty: the recipe's."""
    scorer: str = ""
    """The reward model, a checkpoint of any family; empty: the recipe's, and without one no solution is scored."""
    n: int = Field(64, ge=1)
    """Solutions a question."""
    questions: int | None = Field(None, ge=1)
    """Test questions of each data set at most; null: all. A sample is no benchmark: the table says how many."""
    recipe: str = ""
    """The recipe to take; empty: that of the table, else benchmarks.yaml."""
    baselines: tuple[str, ...] = ()
    """Evaluated runs that stand beside this one, as of another policy or of an API."""


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.evaluate_on``."""
    arguments = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(arguments))


def _main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{all_settings(EvaluateOnConfig)}")
        return 0
    name, *overrides = words
    dry_run = "--dry-run" in overrides
    own, recipe_words = _sorted_words([word for word in overrides if word != "--dry-run"])
    config = load(EvaluateOnConfig, None, own)
    published = table_of(name)
    recipe = recipe_of(name, published.data_sets, config, recipe_words)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    brings_solutions = published.metric != "accuracy"
    if brings_solutions and recipe.models.two_tower is None:
        raise ConfigError(f"{name} measures a reward model, and none is named; say scorer=<checkpoint>")
    if dry_run:
        print_plan(_as_planned(recipe, brings_solutions), steps_between(None, None), console)
        return 0
    run = _run_steps(recipe, console) if brings_solutions else run_pipeline(recipe, steps_between(None, None), console)
    table = table_beside(published, [run.root, *config.baselines], run.root)
    console.print("", summary(table), f"\n{run.root}/benchmarks.html", highlight=False)
    return 0


def _as_planned(recipe: Recipe, brings_solutions: bool) -> Recipe:
    """The recipe without the steps whose tables are imported: they cost nothing."""
    if not brings_solutions:
        return recipe
    return recipe.model_copy(update={"without": (*recipe.without, "sample", "review")})


def _sorted_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of this command, and those of the recipe."""
    own: list[str] = []
    of_recipe: list[str] = []
    for word in words:
        name, _, _ = word.partition("=")
        is_own = name.partition(".")[0] in EvaluateOnConfig.model_fields
        (own if is_own else of_recipe).append(word)
    return own, of_recipe


def recipe_of(name: str, names: Sequence[str], config: EvaluateOnConfig, overrides: Sequence[str]) -> Recipe:
    """The recipe that measures on these data sets; raises `ConfigError` for an unknown one, or one without a folder."""
    known = data_sets()
    sources = []
    for data_set in names:
        if data_set not in known:
            tables = ", ".join(TABLES)
            raise ConfigError(
                f"there is no data set {data_set!r}; name some of {', '.join(known)}, or a table: {tables}"
            )
        if known[data_set].brings == "pictures":
            raise ConfigError(f"{data_set} has pictures and no questions; it is no benchmark")
        if known[data_set].brings == "steps" and len(names) > 1:
            raise ConfigError(
                f"{data_set} brings its own solutions and is measured alone: python -m jobs.evaluate_on {data_set}"
            )
        path = config.paths.get(data_set) or (f"{config.data.rstrip('/')}/{data_set}" if config.data else "")
        if not path:
            raise ConfigError(
                f"data is empty: name the folder that has {data_set}/ in it, or paths.{data_set}=<folder>"
            )
        source = {"name": data_set, "path": path, "num_train": 0}
        if config.questions is not None:
            source["num_test"] = config.questions
        sources.append(source)
    table_recipe = RECIPES / f"table_{name}.yaml"
    file = config.recipe or str(table_recipe if table_recipe.is_file() else RECIPES / BASE)
    words = [file, f"ingest.sources={_inline(sources)}", f"sample.num_samples_test={config.n}"]
    words += [f"plan.test_questions={_num_questions(names, config)}", "plan.train_questions=0"]
    if config.policy:
        words.append(f"models.policy={config.policy}")
    if config.scorer:
        words.append(f"models.two_tower={config.scorer}")
    recipe = load_recipe([*words, *overrides])
    return _without_what_is_not_there(recipe, [*words, *overrides], names)


def _num_questions(names: Sequence[str], config: EvaluateOnConfig) -> int:
    """Test questions of all data sets, as their declarations count them."""
    numbers = []
    for name in names:
        published = data_sets()[name].counts.get("test", 0)
        numbers.append(min(published, config.questions or published))
    return max(sum(numbers), 1)


def _without_what_is_not_there(recipe: Recipe, words: list[str], names: Sequence[str]) -> Recipe:
    """The recipe without the scores that nobody gives; with the expert's labels of benchmarks that bring them."""
    without = list(recipe.without)
    if recipe.models.two_tower is None:
        without.append("score")
    known = data_sets()
    # Their labels are imported in the place of an expert's.
    if all(known[name].brings == "steps" for name in names):
        without = [step for step in without if step != "review"]
    if tuple(without) == recipe.without:
        return recipe
    return load_recipe([*words, f"without={_inline(without)}"])


def _inline(value: object) -> str:
    """A value as it stands in a word of the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()


def _run_steps(recipe: Recipe, console: Console) -> Run:
    """Score solutions that the benchmarks bring, against the labels that they bring."""
    run_pipeline(recipe, steps_between(None, "curate"), console)
    run = Run(recipe)
    # A table that was imported before stays.
    if not run.table("solutions").is_complete:
        import_labels(run)
    return run_pipeline(recipe, [BY_NAME[name] for name in FIGURES_ONLY], console)


def table_beside(published: PublishedTable, folders: Sequence[str], to: str) -> BenchmarkTable:
    """The table of evaluated runs, the first in its first columns; its files are written into the folder `to`."""
    runs = {}
    for folder in folders:
        name = folder.rstrip("/").rpartition("/")[2]
        # Runs of one name lie in folders of other names.
        runs[folder if name in runs else name] = read_run(folder, folder).report
    sizes = {name: data_sets()[name].counts.get("test", 0) for name in published.data_sets}
    table = benchmark_table(published, runs, sizes)
    files = {
        "benchmarks.html": render(table).encode(),
        "benchmarks.md": markdown(table).encode(),
        "benchmarks.json": to_json(table),
    }
    for name, content in files.items():
        write_file(*filesystem(f"{to.rstrip('/')}/{name}"), content)
    return table


if __name__ == "__main__":
    sys.exit(main())
