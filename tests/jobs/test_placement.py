"""What a recipe's section `gpus` becomes in its steps."""

from jobs.graph import STEPS
from jobs.step import Run, load_recipe
from medmm_ray.engines.vllm_engine import VllmEngine

TINY = "jobs/recipes/tiny.yaml"
A100, SPOT = "gpus.accelerator_type=A100", "gpus.label_selector={ray.io/market-type: spot}"


def test_every_step_with_gpus_takes_what_the_recipe_says_once() -> None:
    recipe = Run(load_recipe([TINY, "run=r", A100, SPOT])).recipe
    trainings = [recipe.train_policy, recipe.train_text_prm, recipe.train_two_tower, recipe.meds3.fine_tuning]
    engine = recipe.sample.engine
    assert isinstance(engine, VllmEngine)
    for config in (engine, recipe.tree_search.engine, recipe.embed, recipe.score, recipe.serve, *trainings):
        assert (config.accelerator_type, config.label_selector) == ("A100", {"ray.io/market-type": "spot"})


def test_what_a_section_says_itself_stays() -> None:
    words = ["train_two_tower.label_selector={ray.io/market-type: on-demand}", "score.accelerator_type=L4"]
    recipe = Run(load_recipe([TINY, "run=r", A100, *words])).recipe
    assert recipe.train_two_tower.accelerator_type == "A100"
    assert recipe.train_two_tower.label_selector == {"ray.io/market-type": "on-demand"}
    assert (recipe.score.accelerator_type, recipe.score.label_selector) == ("L4", {})


def test_where_a_step_runs_changes_nothing_of_what_it_makes() -> None:
    plain, placed = Run(load_recipe([TINY, "run=r"])), Run(load_recipe([TINY, "run=r", A100]))
    assert [placed.fingerprint(step) for step in STEPS] == [plain.fingerprint(step) for step in STEPS]
