"""A setting that several sections of a recipe have is said once, and each section may still set its own."""

from pathlib import Path

import pytest
import yaml

from jobs.recipe import Recipe
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError
from tests.paths import ROOT

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


def recipe_of(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe([str(path), f"run={folder}", *overrides])


def test_every_step_that_generates_takes_what_it_does_not_set(tmp_path: Path) -> None:
    text = "generation: {temperature: 0.3, max_tokens: 77, dtype: float16}\nmonte_carlo: {max_tokens: 55}\n"
    recipe = recipe_of(tmp_path, text, "beam_search.temperature=0.9")
    steps = (recipe.sample, recipe.monte_carlo, recipe.tree_search, recipe.beam_search)
    assert [step.temperature for step in steps] == [0.3, 0.3, 0.3, 0.9]
    assert [step.max_tokens for step in steps] == [77, 55, 77, 77]
    assert {step.dtype for step in steps} == {"float16"}
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_no_shipped_recipe_sets_in_two_sections_what_they_share(path: Path) -> None:
    sections = yaml.safe_load(path.read_text())
    for takers in (("sample", "monte_carlo", "tree_search"), ("audit", "train_text_prm", "train_two_tower")):
        settings = [(name, value) for taker in takers for name, value in (sections.get(taker) or {}).items()]
        shared = set(sections.get("generation", {})) | set(sections.get("labels", {}))
        repeated = [name for name, value in settings if name in shared and settings.count((name, value)) > 1]
        assert not repeated


def test_a_model_behind_an_api_has_its_limits_once(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        """
        apis: {gpt-4o: {max_cost_usd: 5.0, requests_per_minute: 60.0, key_variable: OUR_KEY}}
        judge: {backend: openai, model: gpt-4o}
        second_judge: {backend: openai, model: gpt-4o-mini}
        sample: {equivalence: {backend: openai, model: gpt-4o, requests_per_minute: 60.0}}
        """,
    )
    for section in (recipe.judge, recipe.sample.equivalence):
        assert (section.max_cost_usd, section.requests_per_minute, section.key_variable) == (5.0, 60.0, "OUR_KEY")
    assert recipe.second_judge is not None
    assert (recipe.second_judge.max_cost_usd, recipe.second_judge.key_variable) == (None, None)
    assert recipe.sample.max_cost_usd is None  # its policy is a checkpoint


def test_a_policy_behind_an_api_takes_its_limits_too(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        """
        apis: {gpt-4o: {max_cost_usd: 5.0}}
        models: {policy: gpt-4o, text_prm: org/model}
        without: [monte_carlo, tree_search]
        sample: {backend: openai}
        """,
    )
    assert recipe.sample.max_cost_usd == 5.0


def test_limits_of_a_model_that_nobody_asks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apis names gpt-5, which no section of the recipe asks"):
        recipe_of(tmp_path, "apis: {gpt-5: {max_cost_usd: 5.0}}\njudge: {backend: openai, model: gpt-4o}\n")


def test_a_wrong_limit_is_reported_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'apis\.gpt-4o\.max_cost_usd' is 'much'"):
        recipe_of(tmp_path, "apis: {gpt-4o: {max_cost_usd: much}}\njudge: {backend: openai, model: gpt-4o}\n")
