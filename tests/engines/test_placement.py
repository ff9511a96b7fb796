"""Which machines work with GPUs asks for, and what Ray's autoscaler starts for it from the launcher's own files."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from medmm_ray.engines.placement import GpuPlacement, actor_placement, selector_of
from tests.paths import ROOT

KIND, MARKET = "ray.io/accelerator-type", "ray.io/market-type"
Selector = Mapping[str, str]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GpuPlacement(), {}),
        (GpuPlacement(accelerator_type="H100"), {KIND: "H100"}),
        (GpuPlacement(label_selector={MARKET: "on-demand"}), {MARKET: "on-demand"}),
        (GpuPlacement(accelerator_type="A100", label_selector={MARKET: "spot"}), {KIND: "A100", MARKET: "spot"}),
    ],
)
def test_what_is_not_named_is_not_asked_for(config: GpuPlacement, expected: Selector) -> None:
    assert selector_of(config, 0.5) == expected
    assert actor_placement(config, 0.5) == ({"label_selector": expected} if expected else {})


def test_without_a_gpu_any_machine_will_do() -> None:
    assert actor_placement(GpuPlacement(accelerator_type="A100", label_selector={MARKET: "spot"}), 0) == {}


# Ray's autoscaler


def launched(
    path: Path, selectors: Sequence[Selector], resources: Mapping[str, float], without: str = ""
) -> Counter[str]:
    """The machines, by group, that Ray's second autoscaler starts for one actor; of `without` there are none to rent.

    `selectors`: the actor's, best first, as Ray hands on a label_selector and the fallback_strategy behind it.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated import common_pb2

    one_of = common_pb2.LabelSelectorOperator.Value("LABEL_OPERATOR_IN")  # type: ignore[attr-defined]
    constraints = [[(label, one_of, [value]) for label, value in selector.items()] for selector in selectors]
    config = AutoscalingConfig(yaml.safe_load(path.read_text()), skip_content_hash=True)
    request = ResourceRequestUtil.make(dict(resources), label_selectors=constraints or None)
    availability = {without: 0.0} if without else {}
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=False,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([request]),
            cloud_resource_availabilities=availability,
            recoverable_resource_availabilities=availability,
        )
    )
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


ACTOR = {"CPU": 1.0, "GPU": 1.0}
A100 = [selector_of(GpuPlacement(accelerator_type="A100"), 1)]


@pytest.fixture(params=["aws", "gcp"])
def launcher(request: pytest.FixtureRequest) -> Path:
    return ROOT / "cluster" / "launcher" / f"{request.param}.yaml"


def test_the_launchers_groups_grow_from_zero_by_the_labels(launcher: Path) -> None:
    on_demand = selector_of(GpuPlacement(accelerator_type="A100", label_selector={MARKET: "on-demand"}), 1)
    other_kind = selector_of(GpuPlacement(accelerator_type="H100"), 1)
    assert launched(launcher, A100, ACTOR) == {"a100_spot": 1}
    assert launched(launcher, [], ACTOR) == {"a100_spot": 1}
    assert launched(launcher, [on_demand], ACTOR) == {"a100_on_demand": 1}
    assert launched(launcher, [other_kind], ACTOR) == {}
    assert launched(launcher, [], {"CPU": 2.0}) == {"cpu": 1}, "a call of an API rents no GPU"


def test_where_no_spot_machine_is_to_be_had_one_on_demand_is_started(launcher: Path) -> None:
    assert launched(launcher, A100, ACTOR, without="a100_spot") == {"a100_on_demand": 1}


def test_spot_comes_first_by_the_groups_priority(launcher: Path, tmp_path: Path) -> None:
    other = tmp_path / "cluster.yaml"
    other.write_text(re.sub(r"priority: \d+", "priority: -1", launcher.read_text()))
    assert launched(other, A100, ACTOR) == {"a100_on_demand": 1}


def test_a_fallback_strategy_would_never_leave_spot(launcher: Path) -> None:
    """Why none is passed. Where this fails, Ray's autoscaler ranks what is to be had above labels, and one could be."""
    spot_first = [{KIND: "A100", MARKET: "spot"}, {KIND: "A100", MARKET: "on-demand"}]
    assert launched(launcher, spot_first, ACTOR, without="a100_spot") == {"a100_spot": 1}
