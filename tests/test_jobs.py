"""What every entry point has in common: help, recipes, errors in one sentence; and the identity of results."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from jobs import pipeline, plan, query, serve
from jobs.graph import BY_NAME, MAKER, STEPS
from jobs.resources import ResourceSampler
from jobs.step import Job, Run, guarded, load_recipe, main, root_cause, run_step
from medmm_ray.config import ConfigError
from medmm_ray.tables import TableError

RECIPES = sorted(Path("jobs/recipes").glob("*.yaml"))
TINY = "jobs/recipes/tiny.yaml"


def run(*overrides: str) -> Run:
    return Run(load_recipe([TINY, *overrides]))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_step_has_its_job_and_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(import_module(f"jobs.{name}").run)
    assert main(name, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert f"python -m jobs.{name}" in shown
    assert f"{name}." in shown


@pytest.mark.parametrize("entry", [pipeline.main, serve.main, query.main])
def test_the_other_entries_have_help_too(entry: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["--help"]) == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_plan(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([str(recipe), "--dry-run", "run=s3://bucket/run"]) == 0
    shown = capsys.readouterr().out
    assert "Estimate" in shown
    assert "train_two_tower" in shown


def test_medmm_costs_what_the_published_budget_says() -> None:
    recipe = load_recipe(["jobs/recipes/medmm.yaml"])
    planned = plan.plan_of(recipe, Run(recipe))
    assert (planned.train_questions, planned.train_samples, planned.review_steps) == (10_000, 64, 1000)
    assert planned.judge_dollars_per_call * planned.train_questions == 2500


def test_a_policy_behind_an_api_is_priced_and_steps_left_out_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["jobs/recipes/medmm.yaml", "run=s3://bucket/run", "models.policy=gpt-4o", "sample.backend=openai"]
    planned = plan.plan_of(recipe := load_recipe(words), Run(recipe))
    assert (planned.policy_parameters, planned.policy_dollars_per_million_written) == (0, 10.0)
    assert pipeline.main([*words, "--dry-run"]) == 0
    estimate = capsys.readouterr().out.partition("Estimate")[2]
    assert "tree_search" not in estimate
    assert pipeline.main([*words[:2], "without=[]", "--dry-run"]) == 0
    assert "600,000 nodes at most" in " ".join(capsys.readouterr().out.split())


def test_plan_asks_for_numbers_that_it_cannot_know() -> None:
    recipe = load_recipe(["jobs/recipes/smollm2.yaml", "curate.max_test=null"])
    with pytest.raises(ConfigError, match=r"say plan.test_questions=N"):
        plan.plan_of(recipe, Run(recipe))
    recipe = load_recipe([TINY, "plan.gpu=A1000"])
    with pytest.raises(ConfigError, match=r"plan\.gpu is 'A1000'; known: A100-80G"):
        plan.plan_of(recipe, Run(recipe))


def test_graph_is_in_order_and_every_table_has_one_maker() -> None:
    made: set[str] = set()
    for step in STEPS:
        assert set(step.reads) <= made, step.name
        assert not made & set(step.makes)
        made |= set(step.makes)
    assert made == set(MAKER)


def test_what_changes_a_result_changes_its_place_and_all_below_but_nothing_else() -> None:
    base, other = run(), run("sample.temperature=0.1")
    moved = {s.name for s in STEPS if base.fingerprint(s) != other.fingerprint(s)}
    assert moved == {
        "sample", "judge", "monte_carlo", "review", "audit", "train_text_prm", "states", "train_two_tower", "score",
        "evaluate",
    }  # fmt: skip
    same = run("sample.num_actors=7", "sample.batch_size=1", "max_error_rate=0.5")
    assert all(base.fingerprint(s) == same.fingerprint(s) for s in STEPS)


def test_one_seed_reaches_every_section_that_has_one_and_sets_none() -> None:
    recipe = load_recipe([TINY, "seed=7", "judge.seed=3"])
    assert (recipe.ingest.seed, recipe.sample.seed, recipe.train_two_tower.seed, recipe.judge.seed) == (7, 7, 7, 3)


def test_a_list_may_be_set_in_a_recipe_with_a_seed() -> None:
    recipe = load_recipe([TINY, "seed=7", "score.arms=[text_only]", "judge.splits=[train, test]"])
    assert (recipe.score.arms, recipe.judge.splits) == (("text_only",), ("train", "test"))


def test_a_given_model_leaves_its_training_out() -> None:
    given = run("models.policy=org/model")
    assert given.skipped(BY_NAME["train_policy"])
    assert not given.skipped(BY_NAME["train_text_prm"])
    assert given.model("policy") == given.model_id("policy") == "org/model"
    assert given.upstream(BY_NAME["sample"])["policy"] == "org/model"
    with pytest.raises(TableError, match=r"policy.* is not complete"):
        run("run=/tmp/nowhere").model("policy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "name a recipe file first; jobs/recipes/ has medmm.yaml, meds3.yaml, quickstart.yaml",
        ),
        (["nosuch.yaml"], "recipe nosuch.yaml does not exist"),
        ([TINY, "temprature=1"], "unknown name 'sample.temprature'; did you mean 'temperature'?"),
        ([TINY, "run="], "'run' is"),
    ],
)
def test_bad_arguments_end_in_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("sample", words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_step_says_which_step_comes_first(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"sample reads questions, which is not complete .* python -m jobs.curate"):
        run_step(run(f"run={tmp_path}"), BY_NAME["sample"])


def test_guarded_turns_faults_into_sentences_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise TableError("the table is wrong")

    def stop() -> int:
        raise KeyboardInterrupt

    assert guarded(fail) == 1
    assert capsys.readouterr().err.startswith("error: the table is wrong\n")
    assert guarded(stop) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_root_cause_of_an_actor_that_could_not_start() -> None:
    class ActorDiedError(Exception):
        pass

    died = ActorDiedError("The actor died.\n  File x, line 3\nMemoryError: vLLM needs 3 GiB, 1 GiB is free")
    assert root_cause(died) == "MemoryError: vLLM needs 3 GiB, 1 GiB is free"
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("inner")
    assert root_cause(outer) == "ValueError: inner"


def test_an_error_of_ours_is_said_and_not_what_it_came_from() -> None:
    ours = TableError("cannot write to runs/x: free space is missing there")
    ours.__cause__ = OSError(28, "No space left on device")
    assert root_cause(ours) == "cannot write to runs/x: free space is missing there"

    class RayTaskError(Exception):
        pass

    crossed = "OSError: [Errno 28] No space left\n\nThe above ...\n\nmedmm_ray.tables.TableError: cannot write"
    assert root_cause(RayTaskError(crossed)) == "cannot write"
    marked = RayTaskError(crossed)
    marked.__cause__ = type("SystemException", (Exception,), {"__module__": "ray.data.exceptions"})()
    assert root_cause(marked) == "cannot write"


def test_resource_sampler_counts_this_process() -> None:
    with ResourceSampler(interval_s=0.1) as resources:
        resources.sample()
        sum(i * i for i in range(200_000))
    assert 0.01 < resources.peak_gib < 64
    assert resources.core_minutes > 0


def test_a_step_without_which_a_recipe_runs_changes_nothing_and_reads_as_empty() -> None:
    base, other = run(), run("tree_search.max_nodes=9")
    assert base.skipped(BY_NAME["tree_search"])
    assert [s.name for s in STEPS if base.fingerprint(s) != other.fingerprint(s)] == ["tree_search"]
    assert Job(base, BY_NAME["train_text_prm"]).read("tree_labels", ["solution_id"]).num_rows == 0
    asked = run("without=[]")
    moved = {s.name for s in STEPS if base.fingerprint(s) != asked.fingerprint(s)}
    assert moved == {"audit", "train_text_prm", "states", "train_two_tower", "score", "evaluate"}
    graded = run("without=[]", "sample.equivalence.backend=openai", "sample.equivalence.model=m")
    own = BY_NAME["tree_search"]  # it reads no solutions, and grades answers as they are graded
    assert asked.fingerprint(own) == run("without=[]", "sample.temperature=0.1").fingerprint(own)
    assert asked.fingerprint(own) != graded.fingerprint(own)
    assert graded.settings(own)["sample.equivalence"]["model"] == "m"
    with pytest.raises(ConfigError, match="'jugde' is no step; the steps are ingest, "):
        run("without=[jugde]")
