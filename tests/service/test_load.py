"""How many replicas a load asks for, and what Serve is told of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from jobs.benches.slow_engine import SlowModel
from medmm_ray.config import ConfigError, build
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.load import LOAD, replica_options, wanted_replicas
from medmm_ray.service.replica import ReplicaScorer


def context(requests: float, loads: dict[str, float] | None) -> Any:
    """What Serve gives a policy, with 4 requests a replica as the target."""
    metrics = None if loads is None else {LOAD: loads}
    config = AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=4)
    return SimpleNamespace(total_num_requests=requests, aggregated_metrics=metrics, config=config)


@pytest.mark.parametrize(
    ("requests", "loads", "replicas"),
    [
        (12, None, 3.0),  # no replica has reported yet
        (12, {}, 3.0),
        (2, {"a": 3.0, "b": 2.5}, 5.5),  # few requests, but large ones: tokens ask for more
        (20, {"a": 0.1, "b": 0.0}, 5.0),
        (0, {"a": 0.0}, 0.0),
    ],
)
def test_the_replicas_that_requests_or_tokens_ask_for(
    requests: float, loads: dict[str, float] | None, replicas: float
) -> None:
    assert wanted_replicas(context(requests, loads)) == (replicas, {})


def test_a_fixed_number_of_replicas_and_one_that_follows_the_load() -> None:
    fixed = replica_options(ServeConfig(model="m", num_replicas=3))
    assert (fixed["num_replicas"], "autoscaling_config" in fixed) == (3, False)
    options = replica_options(ServeConfig(model="m", min_replicas=0, max_replicas=4, upscale_delay_s=3.0))
    assert "num_replicas" not in options
    scaling = AutoscalingConfig(**options["autoscaling_config"])  # Serve takes it
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (0, 4, 3.0)
    assert scaling.look_back_period_s == 3.0
    assert scaling.policy.get_policy()(context(12, {})) == (3.0, {})
    # A replica that is replaced has the time that its last request may take.
    assert options["graceful_shutdown_timeout_s"] == 150.0


def test_the_fewest_are_not_above_the_most() -> None:
    with pytest.raises(ConfigError, match="min_replicas=3 is above max_replicas=2"):
        build(ServeConfig, {"model": "m", "min_replicas": 3, "max_replicas": 2}, "serve")


def test_a_replica_reports_the_seconds_that_wait_by_the_target() -> None:
    scorer = ReplicaScorer(SlowModel(1e6), ServeConfig(model="m", target_wait_s=0.5), default_budget=1024)
    try:
        assert scorer.stats() == {LOAD: 0.0}
        scorer.batcher.meter.add(1000, 1.0)
        scorer.batcher._preparing[0] = 2000  # as while a request is tokenized
        assert scorer.stats() == {LOAD: pytest.approx(4.0)}
    finally:
        scorer.batcher.close()
