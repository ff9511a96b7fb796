"""Actors and a training's workers on a cluster of labelled machines: `python -m tests.cluster.labels`, by test_labels.

Prints, as JSON, on which machine each ran.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from medmm_ray.engines.placement import GpuPlacement, actor_placement, selector_of
from medmm_ray.session import fresh_token, session

MACHINES = {
    "a100-on-demand": {"ray.io/accelerator-type": "A100", "ray.io/market-type": "on-demand"},
    "l4-spot": {"ray.io/accelerator-type": "L4", "ray.io/market-type": "spot"},
}


class Place:
    """An actor of a step, which says where it is."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.append_column("machine", pa.array([machine()] * len(batch)))


def machine() -> str:
    """The label `machine` of the node that this process runs on."""
    import ray

    labels = ray.get_runtime_context().get_node_labels()
    return str(labels["machine"])


def place_of_actor(config: GpuPlacement, num_gpus: float) -> list[str]:
    """Where a step's actor runs."""
    import ray
    from ray.data import ActorPoolStrategy

    ds = ray.data.from_arrow(pa.table({"row": [1, 2]})).map_batches(
        Place,
        batch_format="pyarrow",
        batch_size=1,
        compute=ActorPoolStrategy(size=1),
        num_gpus=num_gpus,
        **actor_placement(config, num_gpus),
    )
    return sorted({row["machine"] for row in ds.take_all()})


def place_of_workers(config: GpuPlacement) -> list[str]:
    """Where two workers of a training with half a GPU each run."""
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    scaling = ScalingConfig(
        num_workers=2,
        resources_per_worker={"CPU": 1, "GPU": 0.5},
        use_gpu=True,
        label_selector=selector_of(config, 0.5) or None,
    )
    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            import ray.train

            Path(folder, str(ray.train.get_context().get_world_rank())).write_text(machine())

        DataParallelTrainer(work, scaling_config=scaling).fit()
        return [file.read_text() for file in sorted(Path(folder).iterdir())]


def main() -> None:
    from ray.cluster_utils import Cluster

    with ExitStack() as stack:
        stack.enter_context(fresh_token())
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        for name, labels in MACHINES.items():
            cluster.add_node(num_cpus=4, num_gpus=1, labels=labels | {"machine": name})
        stack.enter_context(_address(cluster.address))
        stack.enter_context(session())
        a100 = GpuPlacement(accelerator_type="A100")
        spot = GpuPlacement(label_selector={"ray.io/market-type": "spot"})
        places = {
            "a100": place_of_actor(a100, 1),
            "spot": place_of_actor(spot, 0.5),
            "l4": place_of_actor(GpuPlacement(accelerator_type="L4"), 1),
            "workers on a100": place_of_workers(a100),
        }
    print(json.dumps(places))


def _address(address: str) -> Any:
    from unittest import mock

    return mock.patch.dict("os.environ", RAY_ADDRESS=address)


if __name__ == "__main__":
    main()
