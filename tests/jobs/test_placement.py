"""What a recipe's section `gpus` becomes in its steps."""

from typing import Any

import pytest

from jobs.graph import STEPS
from jobs.placement import gpus_of
from jobs.recipe import Recipe
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError
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


def pool_sizes(*words: str) -> dict[str, int]:
    """Actors and workers of the flagship's steps with GPUs."""
    recipe = Run(load_recipe(["jobs/recipes/medmm.yaml", "run=r", *words]), asks_stores=False).recipe
    return sizes_of(recipe)


def sizes_of(recipe: Recipe) -> dict[str, int]:
    sizes = {"two_tower": recipe.train_two_tower.num_workers}
    for name in ("sample", "monte_carlo", "tree_search", "beam_search"):
        sizes[name] = getattr(recipe, name).engine.num_actors
    for name in ("embed", "states", "score"):
        sizes[name] = getattr(recipe, name).num_actors
    return sizes


@pytest.mark.parametrize("count", [4, 64])
def test_one_number_sizes_every_pool_with_gpus(count: int) -> None:
    sizes = pool_sizes(f"gpus.count={count}")
    assert len(sizes) == 8
    assert set(sizes.values()) == {count}


def test_a_pool_is_as_large_as_its_gpus_have_room_for_and_one_that_says_its_size_keeps_it() -> None:
    sizes = pool_sizes(
        "gpus.count=10", "generation.engine.num_gpus=4", "generation.engine.tensor_parallel_size=4",
        "embed.num_gpus=0.5", "score.num_actors=3", "states.num_gpus=16",
    )  # fmt: skip
    assert (sizes["sample"], sizes["embed"], sizes["score"], sizes["states"]) == (2, 20, 3, 1)


def test_pools_without_gpus_have_the_size_that_they_say() -> None:
    recipe = Run(load_recipe([TINY, "run=r", "gpus.count=64"])).recipe
    unsized = Run(load_recipe([TINY, "run=r"])).recipe
    assert sizes_of(recipe) == sizes_of(unsized)
    assert recipe.retrieve.num_actors == unsized.retrieve.num_actors


def test_two_judges_with_gpus_share_them() -> None:
    words = [
        "judge.engine={kind: vllm, model: a, num_gpus: 1}",
        "second_judge.engine={kind: vllm, model: b, num_gpus: 2}",
    ]
    recipe = Run(load_recipe([TINY, "run=r", "gpus.count=8", *words])).recipe
    assert recipe.second_judge is not None
    assert (recipe.judge.engine.num_actors, recipe.second_judge.engine.num_actors) == (4, 2)


def test_an_elastic_group_never_has_fewer_workers_than_its_least() -> None:
    words = ["train_two_tower.gpus_per_worker=1", "train_two_tower.min_workers=2"]
    assert Run(load_recipe([TINY, "run=r", "gpus.count=1", *words])).recipe.train_two_tower.num_workers == 2
    with pytest.raises(ConfigError, match="min_workers=2 is more than num_workers=1"):
        load_recipe([TINY, "run=r", "train_two_tower.min_workers=2"])


def node(gpus: float, kind: str | None = None, is_alive: bool = True) -> dict[str, Any]:
    labels = {} if kind is None else {"ray.io/accelerator-type": kind}
    return {"Alive": is_alive, "Resources": {"CPU": 8.0, "GPU": gpus} if gpus else {"CPU": 8.0}, "Labels": labels}


def test_without_a_number_the_machines_that_are_there_count() -> None:
    nodes = [node(0), node(8, "A100"), node(8, "A100"), node(4, "L4"), node(8, "A100", is_alive=False)]
    assert gpus_of(nodes, None) == 20
    assert gpus_of(nodes, "A100") == 16
    assert gpus_of(nodes, "H100") == 0


def test_no_fingerprint_depends_on_the_size_of_a_pool() -> None:
    small, large = (
        Run(load_recipe(["jobs/recipes/medmm.yaml", "run=r", f"gpus.count={count}"]), asks_stores=False)
        for count in (4, 64)
    )
    assert [small.fingerprint(step) for step in STEPS] == [large.fingerprint(step) for step in STEPS]
