"""A setting that several sections of a recipe have is said once, and each section may still set its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.recipe import Recipe, asking
from jobs.shared_settings import GenerationConfig, GenerationEngine, LabelsConfig
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError, digest, identity
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine
from medmm_ray.steps.sample import PolicyApi
from tests.paths import ROOT

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


def recipe_of(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe([str(path), f"run={folder}", *overrides])


def test_every_step_that_generates_takes_what_it_does_not_set(tmp_path: Path) -> None:
    text = """
        generation: {temperature: 0.3, max_tokens: 77, engine: {dtype: float16, num_actors: 3}}
        monte_carlo: {max_tokens: 55, engine: {num_actors: 1}}
        """
    recipe = recipe_of(tmp_path, text, "beam_search.temperature=0.9")
    steps = (recipe.sample, recipe.monte_carlo, recipe.tree_search, recipe.beam_search)
    assert [step.temperature for step in steps] == [0.3, 0.3, 0.3, 0.9]
    assert [step.max_tokens for step in steps] == [77, 55, 77, 77]
    assert {step.engine.dtype for step in steps if isinstance(step.engine, VllmEngine)} == {"float16"}
    assert [step.engine.num_actors for step in steps] == [3, 1, 3, 3]
    assert recipe.tree_search.engine.max_concurrency == 16  # its engine's own default
    assert recipe.sample.top_k == 50  # what nobody sets stays the step's own default
    assert recipe.judge.max_tokens != 77


def test_both_trainings_and_the_report_take_the_label_policy(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "labels: {label_policy: judge, after_first_error: keep}\n")
    assert (recipe.train_text_prm.label_policy, recipe.train_two_tower.label_policy) == ("judge", "judge")
    sections = (recipe.audit, recipe.train_text_prm, recipe.train_two_tower)
    assert {section.after_first_error for section in sections} == {"keep"}


def test_a_shared_setting_makes_what_the_same_setting_in_each_section_makes(tmp_path: Path) -> None:
    from jobs.graph import BY_NAME

    once = Run(recipe_of(tmp_path, "generation: {temperature: 0.3}\n"))
    each = Run(recipe_of(tmp_path, "sample: {temperature: 0.3}\nmonte_carlo: {temperature: 0.3}\n"))
    for name in ("sample", "monte_carlo"):
        assert once.fingerprint(BY_NAME[name]) == each.fingerprint(BY_NAME[name])


def test_a_wrong_shared_setting_is_reported_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, "generation: {temperature: warm}\n")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'recipe.yaml'}: 'generation.temperature' is 'warm': Input should be a valid number"
    ]


def leaves(section: dict[str, Any] | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a recipe's section, those of its engine too."""
    for name, value in (section or {}).items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_no_shipped_recipe_sets_in_two_sections_what_they_share(path: Path) -> None:
    sections = yaml.safe_load(path.read_text())
    for shared_name, takers in (
        ("generation", ("sample", "monte_carlo", "tree_search", "beam_search")),
        ("labels", ("audit", "train_text_prm", "train_two_tower")),
    ):
        settings = [setting for taker in takers for setting in leaves(sections.get(taker))]
        shared = list(leaves(sections.get(shared_name)))
        names = set(GenerationConfig.model_fields) | {f"engine.{name}" for name in GenerationEngine.model_fields}
        names |= set(LabelsConfig.model_fields)
        repeated = [(name, value) for name, value in settings if name in names and settings.count((name, value)) > 1]
        assert repeated + [setting for setting in settings if setting in shared] == []


def test_a_policy_behind_an_api_takes_nothing_of_an_engine(tmp_path: Path) -> None:
    text = """
        generation: {temperature: 0.3, engine: {dtype: float16, num_actors: 3}}
        models: {policy: gpt-4o, text_prm: org/model}
        without: [monte_carlo, tree_search]
        sample: {engine: {kind: openai}}
        """
    sample = recipe_of(tmp_path, text).sample
    assert sample.engine == PolicyApi(kind="openai")
    assert sample.temperature == 0.3


def test_a_model_behind_an_api_has_its_limits_once_for_all_that_ask_it(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        """
        apis: {gpt-4o: {requests_per_minute: 60.0, key_variable: OUR_KEY}}
        judge: {engine: {kind: openai, model: gpt-4o}}
        second_judge: {engine: {kind: openai, model: gpt-4o-mini}}
        sample: {equivalence: {engine: {kind: openai, model: gpt-4o}}}
        """,
        "apis.gpt-4o.max_cost_usd=5.0",
    )
    models = asking(recipe)
    for section in ("judge", "sample.equivalence"):
        api = models[section].config
        assert (api.max_cost_usd, api.requests_per_minute, api.key_variable) == (5.0, 60.0, "OUR_KEY")
    assert models["second_judge"].config == ApiConfig()
    assert set(models) == {"judge", "second_judge", "sample.equivalence"}  # the policy is a checkpoint


def test_limits_of_a_model_that_nobody_asks_are_refused_where_another_has_none(tmp_path: Path) -> None:
    text = "apis: {gpt-5: {max_cost_usd: 5.0}}\njudge: {engine: {kind: openai, model: gpt-4o}}\n"
    with pytest.raises(ConfigError, match="apis names gpt-5, which no section of the recipe asks, and not gpt-4o"):
        recipe_of(tmp_path, text)
    # A recipe's judge may be another on the command line.
    assert set(recipe_of(tmp_path, text, "apis.gpt-4o.max_cost_usd=5.0").apis) == {"gpt-4o", "gpt-5"}
    assert recipe_of(tmp_path, text, "judge.engine.kind=phantom").judge.engine == PhantomEngine()


def test_a_models_name_may_have_dots_on_the_command_line(tmp_path: Path) -> None:
    text = "judge: {engine: {kind: gemini, model: gemini-3.5-flash-lite}}\n"
    for word in ("apis.gemini-3.5-flash-lite.max_cost_usd=5.0", "apis.gemini-3.5-flash-lite={max_cost_usd: 5.0}"):
        assert recipe_of(tmp_path, text, word).apis == {"gemini-3.5-flash-lite": ApiConfig(max_cost_usd=5.0)}


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("apis.gpt-4o=5", "apis.gpt-4o=5 names no setting of gpt-4o: write apis.gpt-4o.<setting>=<value>"),
        ("apis.gpt-4.1.max_cost=5", "unknown name 'apis.gpt-4.1.max_cost'; did you mean 'max_cost_usd'?"),
        ("apis.gpt-4.1.max_cost_usd=much", "'apis.gpt-4.1.max_cost_usd' is 'much': Input should be a valid number"),
        ("judge.max_cost_usd=5", "unknown name 'judge.max_cost_usd'; it is set once for each model, as apis.<name>."),
        ("judge.model=gpt-4o", "unknown name 'judge.model'; did you mean 'judge.engine.model'?"),
        (
            "sample.max_model_len=512",
            "unknown name 'sample.max_model_len'; did you mean 'sample.engine.max_model_len'?",
        ),
        ("judge.backend=gemini", "unknown name 'judge.backend'; known names: constrain, engine, "),
        (
            "judge.engine.model=gpt-4o",
            "unknown name 'judge.engine.model'; judge.engine has it where its kind is vllm or gemini or openai",
        ),
        ("judge.engine.kind=gemni", "'judge.engine.kind' is 'gemni'; it is one of phantom, vllm, gemini, openai"),
        (
            "judge.engine.kind=openai",
            "'judge.engine.model' is required; set it in the recipe or as judge.engine.model=",
        ),
        ("judge.engine=openai", "'judge.engine' is 'openai'; it is a section: name its kind as judge.engine.kind=..."),
        ("sample.equivalence.engine.model=m", "'sample.equivalence.engine.kind' is required"),
        ("second_judge.engine.error_rate=2.0", "'second_judge.engine.error_rate' is 2.0: Input should be less than"),
        ("sample.engine.num_gpu=1", "unknown name 'sample.engine.num_gpu'; did you mean 'num_gpus'?"),
    ],
)
def test_what_a_wrong_setting_of_an_engine_or_an_api_is_answered(tmp_path: Path, word: str, fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of(tmp_path, "seed: 0\n", word)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_an_engine_of_another_kind_replaces_the_one_below(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("judge: {num_documents: 2, engine: {error_rate: 0.3, num_actors: 2}}\n")
    text = "extends: base.yaml\n"
    same = recipe_of(tmp_path, text, "judge.engine.num_actors=4").judge
    assert (same.num_documents, same.engine) == (2, PhantomEngine(error_rate=0.3, num_actors=4))
    words = ("judge.engine.model=gemini-3.5-flash", "judge.engine.kind=gemini")
    for order in (words, words[::-1]):
        other = recipe_of(tmp_path, text, *order).judge
        assert (other.num_documents, other.engine) == (2, JudgeApi(kind="gemini", model="gemini-3.5-flash"))
    above = recipe_of(tmp_path, f"{text}judge: {{engine: {{kind: vllm, max_model_len: 99}}}}\n").judge
    assert above.engine == JudgeVllm(max_model_len=99)
    with pytest.raises(ConfigError, match="unknown name 'judge.engine.error_rate'; judge.engine has it where its kind"):
        recipe_of(tmp_path, f"{text}judge: {{engine: {{kind: vllm}}}}\n", "judge.engine.error_rate=0.1")


def test_how_settings_are_grouped_moves_no_seed_and_no_id() -> None:
    """Seeds of samples and ids are made of these hashes: as they were when engines were no sections."""
    hashes = {
        "write_questions": "b5468338f3ec0780",
        "sample": "e2583bf6ca2a111b",
        "judge": "1c43a133ef8fa9ee",
        "monte_carlo": "78d9b94c39482b62",
        "tree_search": "7dfbd5e47793cc46",
        "beam_search": "d7ef37c2e774aa26",
    }
    assert {name: digest(identity(Recipe.model_fields[name].default)) for name in hashes} == hashes
    local = JudgeConfig(engine=JudgeVllm(max_model_len=2048, kv_cache_gib=2), reply="lines")
    behind_api = JudgeConfig(engine=JudgeApi(kind="gemini", model="m", max_images=4))
    assert [digest(identity(judge)) for judge in (local, behind_api)] == ["5a69f3cd79a52327", "fdbfd25918ab5573"]
