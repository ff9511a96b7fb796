"""Benchmarks by name: the recipe that a name gives, and the table beside its run."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import evaluate_on
from jobs.evaluate_on import EvaluateOnConfig, recipe_of
from medmm_ray.config import ConfigError
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.steps.evaluate import EvaluateConfig, evaluate
from medmm_ray.steps.evaluate.benchmark_table import BenchmarkTable, table_of
from medmm_ray.steps.evaluate.published import TABLES
from tests.steps.test_evaluate import small


def test_named_data_sets_become_sources_of_one_run() -> None:
    config = EvaluateOnConfig(data="/data/", paths={"slake": "s3://x/slake"}, policy="p", scorer="s", n=8, questions=50)
    recipe = recipe_of("medqa,slake", ("medqa", "slake"), config, ["run=r", "generation.temperature=1.0"])
    sources = {source.name: source for source in recipe.ingest.sources}
    assert (sources["medqa"].path, sources["slake"].path) == ("/data/medqa", "s3://x/slake")
    assert (sources["medqa"].num_train, sources["medqa"].num_test) == (0, 50)
    assert (recipe.models.policy, recipe.models.two_tower) == ("p", "s")
    assert recipe.sample.num_samples_test == 8
    assert (recipe.sample.temperature, recipe.sample.top_k) == (1.0, 50)
    assert recipe.plan.test_questions == 100
    assert "score" not in recipe.without


def test_without_a_scorer_nothing_is_scored() -> None:
    recipe = recipe_of("medqa", ("medqa",), EvaluateOnConfig(data="/data", policy="p"), ["run=r"])
    assert "score" in recipe.without
    assert recipe.plan.test_questions == 1273


def test_a_benchmark_of_reward_models_keeps_its_experts_labels() -> None:
    config = EvaluateOnConfig(data="/data", scorer="s")
    recipe = recipe_of("processbench", ("processbench",), config, ["run=r"])
    assert "review" not in recipe.without
    assert "judge" in recipe.without


@pytest.mark.parametrize("name", TABLES)
def test_every_published_table_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [name, "data=/data", "scorer=s3://x/scorer", "policy=org/policy", "run=s3://x/run", "--dry-run"]
    assert evaluate_on.main(words) == 0
    printed = capsys.readouterr().out
    assert "score" in printed
    assert ("sample " in printed.partition("Estimate")[2]) == (table_of(name).metric == "accuracy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["medqua", "data=/d"], "there is no data set 'medqua'; name some of"),
        (["medqa"], "data is empty: name the folder that has medqa/ in it, or paths.medqa=<folder>"),
        (["medqa,prmbench", "data=/d", "run=r"], "prmbench brings its own solutions and is measured alone"),
        (["dermnet", "data=/d", "run=r"], "dermnet has pictures and no questions"),
        (["prmbench", "data=/d", "run=r"], "prmbench measures a reward model, and none is named; say scorer="),
    ],
)
def test_what_is_missing_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_on.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_table_lies_beside_the_run(tmp_path: Path) -> None:
    evaluation = evaluate(EvaluateConfig(ns=(1, 2)), **small())
    (tmp_path / "report.json").write_bytes(to_json(evaluation.report))
    pq.write_table(evaluation.outcomes, tmp_path / "outcomes.parquet")
    table = evaluate_on.table_beside(table_of("vqa_rad,slake"), [str(tmp_path)], str(tmp_path))
    assert from_json(BenchmarkTable, (tmp_path / "benchmarks.json").read_bytes()) == table
    assert {file.name for file in tmp_path.iterdir()} >= {"benchmarks.html", "benchmarks.md", "benchmarks.json"}
    with pytest.raises(ConfigError, match="nowhere/report.json does not exist"):
        evaluate_on.table_beside(table_of("slake"), [str(tmp_path), "nowhere"], str(tmp_path))
