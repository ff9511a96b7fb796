"""Steps, a training and the scorer ask for machines by their labels: what each hands to Ray, and where it then runs."""

import json
import subprocess
import sys

import pytest

from medmm_ray.engines.vllm_engine import ActorPool, VllmEngine, actor_options
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.deployment import application
from medmm_ray.session import fresh_token
from medmm_ray.train.launch import _scaling_config
from medmm_ray.train.two_tower import TwoTowerConfig
from tests.paths import ROOT

A100 = {"ray.io/accelerator-type": "A100"}
ON_DEMAND = {"ray.io/market-type": "on-demand"}


def test_an_engine_asks_and_an_api_does_not() -> None:
    assert actor_options(VllmEngine(num_gpus=1, accelerator_type="A100"))["label_selector"] == A100
    for config in (VllmEngine(accelerator_type="A100"), VllmEngine(num_gpus=1), ActorPool()):
        assert "label_selector" not in actor_options(config)


def test_a_trainings_workers_ask() -> None:
    config = TwoTowerConfig(gpus_per_worker=1, accelerator_type="A100", label_selector=ON_DEMAND)
    assert _scaling_config(config).label_selector == A100 | ON_DEMAND
    assert _scaling_config(TwoTowerConfig(gpus_per_worker=1)).label_selector is None


def test_the_scorers_replicas_ask() -> None:
    with fresh_token():
        app = application(ServeConfig(model="org/model", num_gpus=1, accelerator_type="A100", access="loopback"))
    deployment = app._bound_deployment
    assert (deployment.ray_actor_options or {})["label_selector"] == A100


@pytest.mark.engine
def test_work_runs_where_its_labels_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.labels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "a100": ["a100-on-demand"],
        "spot": ["l4-spot"],
        "l4": ["l4-spot"],
        "workers on a100": ["a100-on-demand", "a100-on-demand"],
    }
