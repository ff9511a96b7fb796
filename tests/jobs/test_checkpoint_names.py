"""A recipe that names another run's result by its stable name: what it becomes, and what the fingerprints rest on."""

import operator
from pathlib import Path

import pytest

from jobs.checkpoint_names import with_followed_names
from jobs.graph import BY_NAME
from jobs.preflight import checkpoints_of
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.tables import Artifact, Provenance, follow

TINY = "jobs/recipes/tiny.yaml"
NAMES = (
    "models.policy",
    "models.text_prm",
    "models.two_tower",
    "models.image_tower",
    "embed.text_model",
    "train_policy.base",
    "train_text_prm.base",
    "sample.engine.lora",
    "monte_carlo.engine.lora",
    "tree_search.engine.lora",
    "judge.engine.model",
    "second_judge.engine.model",
    "write_questions.engine.model",
    "serve.model",
)


def commit(folder: Path, fingerprint: str) -> str:
    artifact = Artifact(f"{folder}/{fingerprint}")
    artifact.prepare()
    artifact.commit(Provenance(name="any", fingerprint=fingerprint, config={}, upstream={}), seconds=0.0)
    return str(folder)


def setting(run: Run, name: str) -> str:
    return str(operator.attrgetter(name)(run.recipe))


def words(folder: str, *names: str) -> list[str]:
    engines = [f"{name}.engine.kind=vllm" for name in ("judge", "second_judge", "write_questions")]
    return [TINY, "run=r", *engines, *(f"{name}={folder}" for name in names)]


def test_every_setting_that_names_a_checkpoint_is_followed(tmp_path: Path) -> None:
    folder = commit(tmp_path / "run" / "model", "f00d")
    names = [name for name in NAMES if name != "second_judge.engine.model"]
    run = Run(load_recipe([*words(folder, *names), f"second_judge.engine.model={folder}/latest"]))
    assert {name: setting(run, name) for name in NAMES} == dict.fromkeys(NAMES, f"{folder}/f00d")


def test_the_list_holds_every_setting_that_the_preflight_knows(tmp_path: Path) -> None:
    recipe = load_recipe(
        [
            *words("org/model", *NAMES),
            "second_judge.engine.model=org/other",
            "write_questions.per_image=1",
            "without=[]",
        ]
    )
    settings: set[str] = set()
    for names in checkpoints_of(Run(recipe), list(BY_NAME.values())).values():
        settings.update(names)
    assert settings <= set(NAMES)
    assert len(settings) > 8


def test_fingerprints_rest_on_the_result_not_on_its_name(tmp_path: Path) -> None:
    folder = commit(tmp_path / "run" / "policy", "aaaa")
    arguments = [TINY, "run=r", f"models.policy={folder}"]
    first, step = Run(load_recipe(arguments)), BY_NAME["sample"]
    named = Run(load_recipe([TINY, "run=r", f"models.policy={folder}/aaaa"]))
    assert first.fingerprint(step) == named.fingerprint(step)
    commit(tmp_path / "run" / "policy", "bbbb")
    second = Run(load_recipe(arguments))
    assert second.given("policy") == f"{folder}/bbbb"
    assert second.fingerprint(step) != first.fingerprint(step)


def test_a_recipe_without_such_names_is_the_same_recipe() -> None:
    recipe = load_recipe([TINY, "run=r"])
    assert with_followed_names(recipe) == recipe


def test_a_plan_asks_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.checkpoint_names.follow", lambda name: pytest.fail(f"{name} was looked up"))
    recipe = load_recipe([TINY, "run=r", "models.policy=s3://bucket/run/policy", "embed.text_model=null"])
    assert with_followed_names(recipe, asks_stores=False).models.policy == "s3://bucket/run/policy"


def test_a_recipe_that_was_run_before_is_what_its_runs_names_stand_for_again(tmp_path: Path) -> None:
    step = BY_NAME["train_two_tower"]
    first, second = (Run(load_recipe([TINY, f"run={tmp_path}", f"train_two_tower.epochs={n}"])) for n in (3, 4))
    for run in (first, second):
        Job(run, step).make_artifact("two_tower", lambda uri: {})
    assert follow(f"{tmp_path}/two_tower") == second.uri("two_tower")
    first.point(step)
    assert follow(f"{tmp_path}/two_tower") == first.uri("two_tower")
