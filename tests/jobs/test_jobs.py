"""What every entry point has in common: help, recipes, errors in one sentence; and the identity of results."""

from collections.abc import Callable
from datetime import date
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import judge as judge_job
from jobs import pipeline, plan, query, serve
from jobs.entry import guarded, main, root_cause
from jobs.graph import BY_NAME, MAKER, STEPS
from jobs.recipe import asking
from jobs.resources import ResourceSampler
from jobs.step import Job, Run, load_recipe, run_step
from medmm_ray.config import ConfigError
from medmm_ray.data.records import Query, Vector, to_arrow
from medmm_ray.data.tables import Table, TableError, write_rows
from medmm_ray.engines.llm import prices
from medmm_ray.estimate import Estimate
from medmm_ray.steps.audit.gates import GateError

RECIPES = sorted(Path("jobs/recipes").glob("*.yaml"))
TINY = "jobs/recipes/tiny.yaml"
MODES = ("uncertain", "all", "first_error", "verify")
API = (
    "models.policy=gpt-4o", "sample.engine.kind=openai", "without=[monte_carlo, tree_search]",
    "train_text_prm.base=org/model",
)  # fmt: skip


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


def estimated(*words: str) -> Estimate:
    recipe = load_recipe(["jobs/recipes/medmm.yaml", "run=s3://bucket/run", *words])
    return plan.estimate(recipe, Run(recipe), recipe.without)


def test_medmm_stays_within_the_published_budget() -> None:
    """$2,500 for the judge and $3,900 in all; the judge reads all 64 solutions of 11,000 questions, at token prices."""
    result = estimated()
    judge, sizes = result.line("judge"), result.sizes
    assert (sizes.train_questions, sizes.train_samples, result.line("review").calls) == (10_000, 64, 1000)
    assert judge.calls == 11_000 * 64
    assert load_recipe(["jobs/recipes/medmm.yaml"]).apis[FLASH].max_cost_usd == 2500
    assert judge.dollars < 2500
    assert not any("will stop" in note for note in result.notes)
    assert result.dollars < 3900
    assert estimated("judge.max_solutions=2").line("judge").calls == 22_000
    assert estimated("judge.splits=[train]").line("judge").calls == 640_000
    limited = estimated("apis.gemini-3.5-flash-lite.max_cost_usd=100")
    assert "judge will stop at max_cost_usd=100, before the end: $1,246" in limited.notes


def test_the_models_that_answered_are_told_with_their_labels() -> None:
    parts = [pa.table({"answered_by": pa.array(models, pa.string())}) for models in (["a", None, "b"], ["a", "a, b"])]
    assert judge_job.answered_by(parts) == "labels by the model that answered: a 2; b 1; a, b 1"
    assert judge_job.answered_by(parts[:0]) == ""


FLASH = "gemini-3.5-flash-lite"
FLEX = ("judge.engine.kind=openai", f"judge.engine.model={FLASH}", f"apis.{FLASH}.tier=flex")


def test_the_flex_tier_is_half_the_price_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "today", lambda: date(2026, 11, 30))
    whole, half = (estimated(*words).line("judge").dollars for words in ((), FLEX))
    assert half == pytest.approx(whole / 2)
    [told] = plan.price_notes(asking(load_recipe(["jobs/recipes/medmm.yaml", *FLEX])))
    assert told.startswith("judge is priced at the flex tier, 50% of the list price; ")
    assert estimated(f"apis.{FLASH}.tier=flex").line("judge").dollars == half
    with pytest.raises(ConfigError, match="tier=flex does not go with gemini_client=sdk"):
        estimated(f"apis.{FLASH}.tier=flex", f"apis.{FLASH}.gemini_client=sdk")


def test_the_plan_tells_of_old_prices_and_of_models_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "today", lambda: date(2026, 11, 30))
    recipe = load_recipe(
        ["jobs/recipes/medmm.yaml", "second_judge.engine.kind=openai", "second_judge.engine.model=gpt-4o"]
    )
    old, ending = plan.price_notes(asking(recipe))
    assert old.startswith("second_judge: the price of gpt-4o was read on 2026-05-15, 199 days ago")
    assert ending.startswith("second_judge: gpt-4o is to be shut down on 2027-01-14")


def test_the_plan_follows_the_modes_and_models_of_the_recipe() -> None:
    """640,000 solutions, half of them assumed to be wrong: only those are continued, but not their last steps."""
    rolls = {mode: estimated(f"monte_carlo.mode={mode}").line("monte_carlo").work for mode in MODES}
    assert rolls == {
        "uncertain": "uncertain: 256,000 steps x 4", "all": "all: 2,240,000 steps x 4",
        "first_error": "first_error: 960,000 steps x 4", "verify": "verify: 640,000 steps x 4",
    }  # fmt: skip
    assert "320,000" in estimated("monte_carlo.mode=verify", "monte_carlo.max_solutions=32").line("monte_carlo").work
    every = estimated("monte_carlo.mode=all", "monte_carlo.wrong_only=false", "monte_carlo.stop_early=false")
    assert every.line("monte_carlo").work == "all: 4,480,000 steps x 4"
    local = ("judge.engine.kind=vllm",)
    ours = estimated(*local, "plan.policy_parameters=1e9").line("judge")
    assert (ours.dollars, ours.gpu_hours > 0) == (0, True)
    smaller = estimated(*local, "judge.engine.model=some/vlm", "plan.judge_parameters=1e9").line("judge")
    assert smaller.gpu_hours == pytest.approx(ours.gpu_hours)
    asked = estimated(
        "sample.equivalence.engine={kind: gemini, model: gemini-2.5-flash}", "write_questions.per_image=1",
        "write_questions.engine.model=gpt-4o", "write_questions.max_images=100", "write_questions.num_checks=0",
    )  # fmt: skip
    assert asked.line("equivalence").calls == 22_000
    assert asked.line("equivalence").dollars == pytest.approx(22_000 * (305 * 0.3 + 10 * 2.5) / 1e6)
    assert asked.line("write_questions").dollars == pytest.approx(100 * (1015 * 2.5 + 180 * 10) / 1e6)


def test_the_plan_says_where_its_word_replaces_the_recipes() -> None:
    words = ["plan.train_questions=500", "plan.test_questions=1000", "judge.engine={kind: vllm, model: some/vlm}"]
    words += ["write_questions.per_image=1", "write_questions.engine={kind: vllm, model: a/vlm}"]
    recipe = load_recipe(["jobs/recipes/medmm.yaml", *words])
    assert plan.replaced(recipe) == [
        "plan.train_questions=500 stands in place of the 10,000 to which the recipe limits it",
        "judge: the size of some/vlm is not known; it is taken to be the policy's, 8.03B parameters",
        "write_questions: the size of a/vlm is not known; it is taken to be the policy's, 8.03B parameters",
    ]
    assert plan.replaced(load_recipe(["jobs/recipes/medmm.yaml"])) == []


def test_a_policy_behind_an_api_is_priced_and_steps_left_out_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["jobs/recipes/medmm.yaml", "run=s3://bucket/run", *API, "sample.top_k=0"]
    policy = plan.sizes_of(load_recipe(words)).policy
    assert (policy.parameters, policy.output_price) == (0, 10.0)
    assert pipeline.main([*words, "--dry-run"]) == 0
    estimate = capsys.readouterr().out.partition("Estimate")[2]
    assert "tree_search" not in estimate
    assert pipeline.main([*words[:2], "without=[]", "--dry-run"]) == 0
    assert "600,000 nodes at most" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models.policy=null"], "sample.engine.kind is 'openai' and models.policy is not set; name the API's model"),
        (
            ["without=[]"],
            "monte_carlo and tree_search would continue solutions from inside a step, which models.policy=gpt-4o "
            "behind an API (sample.engine.kind=openai) cannot; leave out what cannot be done: "
            "without=[monte_carlo, tree_search]",
        ),
        (["without=[tree_search]"], "without=[tree_search, monte_carlo]"),
        (["train_text_prm.base=null"], "train_text_prm would start from models.policy=gpt-4o, which is behind an API"),
        (["judge.engine.kind=vllm"], "judge.engine is vLLM's and would take models.policy=gpt-4o"),
        (["sample.top_k=50"], "sample: engine.kind is 'openai', and no API takes top_k=50; set top_k=0"),
    ],
)
def test_a_policy_behind_an_api_is_asked_for_whole_solutions_alone(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(*API, *words)
    assert str(refused.value).startswith(f"{TINY}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "'ingest'" not in str(refused.value)  # the sentence, not the whole recipe


def test_a_policy_behind_an_api_with_what_else_is_needed() -> None:
    given = run(*API, "train_text_prm.base=null", "models.text_prm=org/prm")
    assert [step.name for step in STEPS if given.skipped(step)] == [
        "train_policy", "monte_carlo", "tree_search", "train_text_prm"
    ]  # fmt: skip
    assert run(*API, "judge.engine={kind: vllm, model: org/judge}").given("policy") == "gpt-4o"
    assert run("sample.engine.kind=openai", "without=[sample]").recipe.models.policy is None


def test_a_second_judge_is_part_of_the_labels_and_of_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["jobs/recipes/medmm.yaml", "run=s3://bucket/run"]
    alone = Run(load_recipe(words))
    both = Run(load_recipe([*words, "second_judge.engine.kind=openai", "second_judge.engine.model=gpt-4o"]))
    judge = BY_NAME["judge"]
    assert both.fingerprint(judge) != alone.fingerprint(judge)
    assert both.fingerprint(BY_NAME["sample"]) == alone.fingerprint(BY_NAME["sample"])
    assert "second_judge" not in Job(alone, judge).origin("judge_labels").config
    assert Job(both, judge).origin("judge_labels").config["second_judge"]["model"] == "gpt-4o"
    assert (
        pipeline.main([*words, "second_judge.engine.kind=openai", "second_judge.engine.model=gpt-4o", "--dry-run"]) == 0
    )
    assert "second_judge" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"second_judge is the judge itself \(phantom, seed 0\)"):
        load_recipe([TINY, "second_judge.engine.error_rate=0.2"])
    load_recipe([TINY, "second_judge.seed=1"])


def test_plan_asks_for_numbers_that_it_cannot_know() -> None:
    recipe = load_recipe(["jobs/recipes/smollm2.yaml", "curate.max_test=null"])
    with pytest.raises(ConfigError, match=r"say plan.test_questions=N"):
        plan.estimate(recipe, Run(recipe))
    recipe = load_recipe([TINY, "write_questions.per_image=1", "write_questions.engine.model=gpt-4o"])
    with pytest.raises(ConfigError, match=r"say plan.written_images=N or write_questions.max_images=N"):
        plan.estimate(recipe, Run(recipe))
    recipe = load_recipe([TINY, "plan.gpu=A1000"])
    with pytest.raises(ConfigError, match=r"plan\.gpu is 'A1000'; known: A100-80G"):
        plan.estimate(recipe, Run(recipe))


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
    same = run("sample.engine.num_actors=7", "sample.engine.batch_size=1", "max_error_rate=0.5")
    assert all(base.fingerprint(s) == same.fingerprint(s) for s in STEPS)


def test_one_seed_reaches_every_section_that_has_one_and_sets_none() -> None:
    recipe = load_recipe([TINY, "seed=7", "judge.seed=3"])
    assert (recipe.ingest.seed, recipe.sample.seed, recipe.train_two_tower.seed, recipe.judge.seed) == (7, 7, 7, 3)


def test_a_list_may_be_set_in_a_recipe_with_a_seed() -> None:
    recipe = load_recipe([TINY, "seed=7", "score.arms=[text_only]", "judge.splits=[train, test]"])
    assert (recipe.score.arms, recipe.judge.splits) == (("text_only",), ("train", "test"))


@pytest.mark.parametrize(
    "word",
    [
        "max_error_rate=1.1", "max_error_rate=-0.1", "ingest.sources.0.num_train=-1", "ingest.sources.0.num_test=-1",
        "ingest.sources.0.num_extra_images=-1",
        "ingest.sources.0.num_worked=-1",
        "ingest.sources.0.image_size=0", "ingest.batch_size=0",
        "sample.engine.batch_size=0", "sample.engine.num_actors=0", "train_policy.batch_size=0",
        "train_text_prm.batch_size=0", "train_two_tower.batch_size=0", "train_image_tower.batch_size=0",
        "embed.text_batch_size=0",
        "judge.temperature=.inf", "apis.gpt-4o.max_cost_usd=.nan",
    ],
)  # fmt: skip
def test_a_number_that_can_mean_nothing_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"'{word.partition('=')[0]}' is .*: Input should be "):
        load_recipe([TINY, word])


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
            "name a recipe file first; jobs/recipes/ has benchmarks.yaml, medmm.yaml, meds3.yaml",
        ),
        (["nosuch.yaml"], "recipe nosuch.yaml does not exist"),
        ([TINY, "temprature=1"], "unknown name 'sample.temprature'; did you mean 'temperature'?"),
        ([TINY, "run="], "'run' is"),
        (
            [TINY, "judge.splits=[trian]"],
            "'judge.splits.0' is 'trian': Input should be 'train', 'validation' or 'test'",
        ),
        ([TINY, "evaluate.split=tset"], "'evaluate.split' is 'tset': Input should be 'train', 'validation' or 'test'"),
        ([TINY, "monte_carlo.splits=[]"], "'monte_carlo.splits' is []: name one split or more, or leave the step out"),
        ([TINY, "seed=abc"], f"error: {TINY}: 'seed' is 'abc': Input should be a valid integer\n"),
    ],
)
def test_bad_arguments_end_in_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("sample", words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
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
    assert root_cause(GateError("1 gate of 9 fails")) == "1 gate of 9 fails"
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
    graded = run("without=[]", "sample.equivalence.engine={kind: openai, model: m}")
    own = BY_NAME["tree_search"]  # it reads no solutions, and grades answers as they are graded
    assert asked.fingerprint(own) == run("without=[]", "sample.temperature=0.1").fingerprint(own)
    assert asked.fingerprint(own) != graded.fingerprint(own)
    assert graded.settings(own)["sample.equivalence"]["model"] == "m"
    with pytest.raises(ConfigError, match="'jugde' is no step; the steps are ingest, "):
        run("without=[jugde]")


def test_progress_counts_the_rows_of_the_table_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, said = Job(run(f"run={tmp_path}"), BY_NAME["embed"]), []
    three = [Vector(item_id=name, vector=[1.0]) for name in "abc"]
    write_rows(job.table("image_vectors"), three, job.origin("image_vectors"), "item_id")

    queries = [Query(question_id=name, text="?", vector=[1.0]) for name in "abc"]

    def write(table: Table, _: object, key: str, explode: str | None, written: object) -> None:
        assert explode is None
        for rows in (queries[:2], queries[2:]):
            table.write_part(to_arrow(Query, rows), key)
            said.append(job.progress())

    monkeypatch.setattr(Table, "write", write)
    job.make("queries", object(), "abc", lambda ds: ds, "question_id")  # type: ignore[arg-type]
    assert said == ["rows of queries: 2 of 3", "rows of queries: 3 of 3"]
