"""The steps that `STEPS` names, on scripted engines, at the cluster of ``RAY_ADDRESS``; says what nodes there are.

Lines: ``begin STEP``, ``end STEP`` and, whenever they change, ``nodes {"group": [ids]}``. What a step asks of the
cluster is its own: pools of actors with their resources and labels, a training's group of workers. A scripted training
sleeps where a real one would compute. After the last step it goes on until the nodes are gone.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from functools import partial
from typing import Any

from jobs.benches.scripted import use_scripted_engines
from jobs.graph import BY_NAME
from jobs.step import Run, load_recipe, run_step
from medmm_ray.data.artifacts import filesystem, write_file
from medmm_ray.session import session
from medmm_ray.train.progress import HISTORY
from tests.doubles.autoscaling import HEAD

GONE_S = 90.0


def nodes() -> dict[str, list[str]]:
    """The ids of the nodes that the autoscaler has up, by their group; without the head."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(os.environ["RAY_ADDRESS"])
    ids: dict[str, list[str]] = defaultdict(list)
    for node in (*status.active_nodes, *status.idle_nodes):
        if node.instance_id != HEAD:
            ids[node.ray_node_type_name].append(node.instance_id)
    return {group: sorted(ids[group]) for group in sorted(ids)}


class Watch(threading.Thread):
    """Prints the nodes whenever they change."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.present: dict[str, list[str]] = {}

    def run(self) -> None:
        while True:
            present = nodes()
            if present != self.present:
                self.present = present
                print(f"nodes {json.dumps(present)}", flush=True)
            time.sleep(0.5)


def train(arguments: dict[str, Any], pause_s: float) -> None:
    """A worker of the scripted training: the first one leaves its history as a real one does."""
    import ray.train

    time.sleep(pause_s)
    if ray.train.get_context().get_world_rank() == 0:
        history = {"epochs": [{"loss": 1.0}], "best_epoch": None, "updates": [1.0], "samples": 1, "tokens": 1}
        fs, path = filesystem(f"{arguments['folder']}/{HISTORY}")
        write_file(fs, path, json.dumps(history | {"seconds": 1.0}).encode())


def use_scripted_training(pause_s: float) -> None:
    """Let trainings run `train` in their workers, without torch's process group: the GPUs are made up."""
    import ray.train.torch
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def __init__(self, _: object, *, torch_config: object, **options: Any) -> None:
            super().__init__(partial(train, pause_s=pause_s), **options)

    setattr(ray.train.torch, "TorchTrainer", Trainer)  # noqa: B010 - a type checker takes it for a class alone


def main() -> None:
    run = Run(load_recipe(sys.argv[1:]))
    with session():
        watch = Watch()
        watch.start()
        pause_s = float(os.environ["PAUSE_S"])
        use_scripted_engines(pause_s)
        use_scripted_training(4 * pause_s)
        for name in os.environ["STEPS"].split():
            print(f"begin {name}", flush=True)
            run_step(run, BY_NAME[name])
            print(f"end {name}", flush=True)
        deadline = time.monotonic() + GONE_S
        while watch.present and time.monotonic() < deadline:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
