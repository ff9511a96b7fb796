"""What `jobs.serve` serves: the recipe's section, with the run's own model and index where it names none."""

from pathlib import Path

from jobs.serve import serve_config
from jobs.step import Run, load_recipe
from tests.doubles.clip_folders import write_native_clip
from tests.paths import ROOT


def config_of(folder: Path, *words: str) -> Run:
    tower = write_native_clip(folder / "tower")
    recipe = str(ROOT / "jobs/recipes/tiny.yaml")
    return Run(load_recipe([recipe, f"run={folder}", f"models.image_tower={tower}", "serve.model=org/m", *words]))


def test_evidence_comes_from_the_runs_own_index_as_the_recipe_searches_it(tmp_path: Path) -> None:
    run = config_of(tmp_path, "serve.retrieval={num_replicas: 2}", "retrieve.num_documents=7")
    config = serve_config(run)
    assert config.model == "org/m"
    assert config.retrieval is not None
    assert config.retrieval.index == run.uri("index")
    assert config.retrieval.image_tower == str(tmp_path / "tower")
    assert (config.retrieval.retrieve.num_documents, config.retrieval.num_replicas) == (7, 2)
    assert config.retrieval.embed == run.recipe.embed


def test_what_the_recipe_says_of_its_index_stands(tmp_path: Path) -> None:
    run = config_of(tmp_path, "serve.retrieval={index: s3://b/index, retrieve: {num_documents: 3}}")
    config = serve_config(run).retrieval
    assert config is not None
    assert (config.index, config.retrieve.num_documents) == ("s3://b/index", 3)
    assert serve_config(config_of(tmp_path / "other")).retrieval is None
