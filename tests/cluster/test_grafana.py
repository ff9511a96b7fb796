"""The dashboards ask for figures that the service has."""

import json
import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from jobs.benches.slow_engine import SlowModel
from medmm_ray.service.batch_metrics import BatchCollector
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.metrics import ServiceMetrics
from medmm_ray.service.replica import ReplicaScorer
from tests.paths import ROOT

BOARDS = sorted((ROOT / "cluster" / "grafana").glob("*.json"))


def exported() -> set[str]:
    """The names of all samples that a replica gives; of a metric with labels those that it would have."""
    scorer = ReplicaScorer(SlowModel(1e6), ServeConfig(model="m"), default_budget=1024)
    metrics = ServiceMetrics()
    metrics.requests.labels("/v1/rerank", "POST", "200").inc()
    metrics.seconds.labels("/v1/rerank").observe(0.1)
    metrics.know("medmm")
    registry = CollectorRegistry()
    registry.register(BatchCollector(scorer))
    try:
        text = (metrics.text() + generate_latest(registry)).decode()
    finally:
        scorer.batcher.close()
    return set(re.findall(r"^(medmm_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: object) -> None:
    board = json.loads(ROOT.joinpath(str(path)).read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 9
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


def test_every_figure_of_ours_is_one_that_a_replica_gives() -> None:
    asked = set(re.findall(r"\bmedmm_\w+", "".join(path.read_text() for path in BOARDS))) - {"medmm_ray"}
    assert len(asked) > 15
    assert asked - exported() == set()
