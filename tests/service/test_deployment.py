"""Which checkpoint a name stands for, and what the words of `serve run` become."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.benches.serve_replicas import ReplicasConfig, measure_replicas
from medmm_ray.data.artifacts import Artifact, Provenance
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.service.deployment import build_app, checkpoint_of
from medmm_ray.session import fresh_token, has_token_mode
from medmm_ray.steps.sample import PolicyApi


def make_artifact(run: Path, name: str, fingerprint: str) -> None:
    artifact = Artifact(f"{run}/{name}/{fingerprint}")
    artifact.prepare()
    artifact.commit(Provenance(name=name, fingerprint=fingerprint, config={}, upstream={}), seconds=0.0)


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert checkpoint_of(str(run)) == str(run)
    make_artifact(run, "text_prm", "aaaa")
    assert checkpoint_of(str(run)) == f"{run}/text_prm/aaaa"
    make_artifact(run, "two_tower", "bbbb")
    make_artifact(run, "two_tower", "cccc")
    (run / "two_tower" / "dddd").mkdir()  # of a training that has not ended
    for name in (run, f"{run}/", f"{run}/two_tower", f"{run}/two_tower/cccc"):
        assert checkpoint_of(str(name)) == f"{run}/two_tower/cccc"
    assert checkpoint_of(f"{run}/two_tower/bbbb") == f"{run}/two_tower/bbbb"
    assert checkpoint_of("org/model") == "org/model"


@pytest.fixture
def token_mode() -> Iterator[None]:
    """Ray's, as in a session: that of the tests' own session where it is up."""
    with nullcontext() if has_token_mode() else fresh_token():
        yield


def bound(app: Any) -> Any:
    return app._bound_deployment


@pytest.mark.usefixtures("token_mode")
def test_new_weights_of_a_further_model_replace_its_replicas_and_those_that_know_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_artifact(run, "two_tower", "aaaa")
    settings: dict[str, Any] = {"model": str(tmp_path), "access": "loopback", "models": {"next": {"model": str(run)}}}
    folders = []
    for fingerprint in ("aaaa", "bbbb"):
        make_artifact(run, "two_tower", fingerprint)
        first = bound(build_app(settings))
        further = bound(first.init_kwargs["further"]["next"])
        assert (further.name, further.init_args[0].model) == ("Model-next", f"{run}/two_tower/{fingerprint}")
        folders.append(first.init_args[0].models["next"].model)
    assert folders == [f"{run}/two_tower/aaaa", f"{run}/two_tower/bbbb"]


@pytest.mark.usefixtures("token_mode")
def test_a_policy_of_our_own_engine_has_a_deployment_and_one_behind_an_api_none(tmp_path: Path) -> None:
    shared = {"model": str(tmp_path), "access": "loopback"}
    deployed = bound(build_app({**shared, "policy.model": str(tmp_path), "policy.engine.num_gpus": "0.5"}))
    config, policy = deployed.init_args[0], deployed.init_kwargs["policy"]
    assert isinstance(config.policy.engine, VllmEngine)
    assert (bound(policy).name, bound(policy).ray_actor_options["num_gpus"]) == ("Policy", 0.5)
    words = {"policy.model": "m", "policy.engine.kind": "openai", "policy.api.endpoint": "http://127.0.0.1:1/v1"}
    deployed = bound(build_app({**shared, **words}))
    config, policy = deployed.init_args[0], deployed.init_kwargs["policy"]
    assert isinstance(config.policy.engine, PolicyApi)
    assert config.policy.api.endpoint == "http://127.0.0.1:1/v1"
    assert policy is None
    assert bound(build_app(shared)).init_kwargs["policy"] is None


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_new_weights_of_a_further_model_come_under_load_without_a_failed_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    config = ReplicasConfig(events=("replace_further",), steady_s=9)
    failed, new = measure_replicas(config, Console(quiet=True))
    assert failed.baseline == 90, "ten a second"
    assert failed.ours == 0
    assert new.baseline == 20
    assert new.ours == new.baseline
