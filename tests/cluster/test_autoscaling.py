"""Steps on groups of nodes that start at zero: each brings up what it asks for and no more, and lets it go again."""

import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from medmm_ray.data.records import Labels, Solutions
from medmm_ray.data.tables import Table
from tests.doubles.autoscaling import AutoscalingCluster, autoscaling_cluster
from tests.paths import ROOT

SETTINGS = {
    "models.image_tower": "scripted",
    "without": "[embed,index,retrieve,tree_search]",
    "max_error_rate": 0,
    "write_questions.per_image": 0,
    "ingest.sources.0.num_train": 24,
    "ingest.sources.0.num_test": 8,
    "ingest.batch_size": 16,
    "train_policy.gpus_per_worker": 1,
    "train_policy.num_workers": 2,
    "train_policy.accelerator_type": "A100",
    "sample.engine.num_gpus": 1,
    "sample.engine.num_cpus": 1,
    "sample.engine.num_actors": 1,
    "sample.engine.batch_size": 4,
    "sample.engine.max_concurrency": 1,
    "sample.engine.accelerator_type": "L4",
    "monte_carlo.engine.num_gpus": 1,
    "monte_carlo.engine.num_cpus": 1,
    "monte_carlo.engine.accelerator_type": "L4",
}
LONG_FORM = (
    *("ingest", "write_questions", "curate", "train_policy", "sample"),
    *("judge", "monte_carlo", "review", "audit"),
)


class Course:
    """A driver's steps on a cluster, read to their end, and what it says of the nodes meanwhile.

    `new_nodes` are those that came up in each step, by group, `last_nodes` those that are up at the end. The first node
    of the group `taken_away` vanishes a moment after it has come; its id is `lost_node`.
    """

    def __init__(
        self,
        cluster: AutoscalingCluster,
        run: Path,
        environment: Mapping[str, str],
        taken_away: str = "",
        words: Sequence[str] = (),
    ) -> None:
        settings = [f"{name}={value}" for name, value in SETTINGS.items()]
        words = ["jobs/recipes/tiny.yaml", f"run={run}", *settings, *words]
        self.new_nodes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.last_nodes: dict[str, list[str]] = {}
        self.lost_node = ""
        self._ids_so_far: set[str] = set()
        lines, step = [], ""
        with subprocess.Popen(
            [sys.executable, "-m", "tests.doubles.autoscaled_steps", *words],
            cwd=ROOT,
            env=os.environ | environment | {"RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as driver:
            assert driver.stdout is not None
            for line in driver.stdout:
                lines.append(line)
                word, _, rest = line.strip().partition(" ")
                if word == "begin":
                    step = rest
                elif word == "nodes":
                    self._note(step, json.loads(rest))
                    if taken_away in self.last_nodes and not self.lost_node:
                        self.lost_node = self.last_nodes[taken_away][0]
                        threading.Timer(2.0, cluster.take_away, [self.lost_node]).start()
        assert driver.returncode == 0, "".join(lines)[-5000:]

    def _note(self, step: str, nodes: dict[str, list[str]]) -> None:
        self.last_nodes = nodes
        for group, ids in nodes.items():
            # A busy cluster may leave a node out of its status for a moment: it is not new when it is back.
            if new_ids := set(ids) - self._ids_so_far:
                self.new_nodes[step][group] |= new_ids
                self._ids_so_far |= new_ids


def made(run: Path, name: str, record: type) -> Table:
    """The one table of that name in the run."""
    [folder] = (run / name).glob("*/manifest.json")
    return Table(str(folder.parent), record)


@pytest.mark.chaos
def test_each_step_brings_up_its_group_and_a_spot_node_that_vanishes_is_replaced(tmp_path: Path) -> None:
    environment = {"STEPS": " ".join(LONG_FORM), "PAUSE_S": "1"}
    with autoscaling_cluster() as cluster:
        course = Course(cluster, tmp_path / "run", environment, taken_away="infer_spot")
    groups = {step: set(nodes) for step, nodes in course.new_nodes.items()}
    assert groups.pop("ingest") == {"cpu"}
    assert groups.pop("train_policy") == {"train"}
    # Where a spot machine went, the other group of its kind may follow.
    assert "infer_spot" in groups["sample"]
    for step in ("sample", "monte_carlo"):  # the second may find the first's nodes
        assert groups.pop(step, set()) <= {"cpu", "infer_spot", "infer_on_demand"}, step
    for step in ("judge", "review", "audit"):
        assert groups.pop(step, set()) <= {"cpu"}, step
    assert groups == {}
    assert len(course.new_nodes["train_policy"]["train"]) == 1
    infer_nodes = course.new_nodes["sample"]["infer_spot"] | course.new_nodes["sample"]["infer_on_demand"]
    assert course.lost_node in infer_nodes
    assert len(infer_nodes) >= 2
    assert course.last_nodes == {}
    solutions = made(tmp_path / "run", "solutions", Solutions)
    ids = solutions.to_arrow(["question_id"])["question_id"].to_pylist()
    assert (len(ids), len(set(ids)), solutions.manifest().errors) == (32, 32, {})
    judged = made(tmp_path / "run", "judge_labels", Labels).manifest()
    assert (judged.rows, judged.errors) == (32 * 4, {})
    continued = made(tmp_path / "run", "monte_carlo_labels", Labels).manifest()
    assert continued.rows > 0
    assert continued.errors == {}


@pytest.mark.engine
def test_steps_bring_up_what_they_ask_for_and_let_it_go(tmp_path: Path) -> None:
    """The short form: no training, and no node vanishes."""
    environment = {"STEPS": "ingest write_questions curate sample judge", "PAUSE_S": "0.1"}
    with autoscaling_cluster() as cluster:
        course = Course(
            cluster, tmp_path / "run", environment, words=["models.policy=scripted", "ingest.sources.0.num_train=8"]
        )
    groups = {step: set(nodes) for step, nodes in course.new_nodes.items()}
    assert groups.pop("ingest") == {"cpu"}
    assert groups.pop("sample") <= {"cpu", "infer_spot"}
    # The nodes of the steps before may be up still, and serve it.
    assert groups.pop("judge", set()) <= {"cpu"}
    assert groups == {}
    assert len(course.new_nodes["sample"]["infer_spot"]) == 1
    assert course.last_nodes == {}
    labels = made(tmp_path / "run", "judge_labels", Labels).manifest()
    assert (labels.rows, labels.errors) == (16 * 4, {})
