"""Jobs that are killed and interrupted, resumed: their tables equal those of an undisturbed run."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from jobs.benches import fault_injection
from jobs.benches.fault_injection import Driver, Fault, FaultInjector, PreemptibleCluster, kill_survivors
from jobs.benches.model_server import in_thread
from jobs.benches.resume import BenchConfig, ResumeExperiment, curves, plan
from jobs.benches.scripted import ScriptedGenerator
from jobs.benches.scripted_api import ScriptedApi, reply_to, stored_answers
from jobs.step import load_recipe
from medmm_ray.config import load
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Sampling
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.steps.write_questions import SCHEMA, SOLVE_SCHEMA, draft, letter, repeats
from medmm_ray.text import extract_answer, split_steps

TINY = "jobs/recipes/tiny.yaml"


@pytest.fixture
def experiment(tmp_path: Path) -> Iterator[ResumeExperiment]:
    steps = ("sample", "judge", "monte_carlo")
    config = BenchConfig(faults=4, steps=steps, questions=16, nodes=3, kinds=("actor", "driver", "ctrl-c", "node"))
    with in_thread(ScriptedApi(config.pause_s)) as api:
        yield ResumeExperiment(config, tmp_path, api, Console())


@pytest.mark.engine
def test_a_machine_and_an_actor_lost_a_run_killed_and_interrupted_leave_the_tables_of_an_undisturbed_one(
    experiment: ResumeExperiment,
) -> None:
    """The round with faults runs on three nodes, the undisturbed one on this machine alone."""
    experiment.run_undisturbed()
    # Early in their steps: beside other work one step may take twice the time of another run.
    faults = [
        Fault("node", "sample", 0.3),
        Fault("driver", "judge", 0.05),
        Fault("actor", "monte_carlo", 0.05),
        Fault("ctrl-c", "monte_carlo", 0.2),
    ]
    results, late = experiment.run_round("rough", faults)
    assert late == []
    assert [driver.process.returncode for driver in experiment.drivers] == [0, -9, 130, 0]
    undisturbed, killed, *_ = (driver.log.read_text().splitlines() for driver in experiment.drivers)
    assert [line for line in undisturbed if line.split()[-1] in ("sample", "judge")] == [
        "begin sample", "end sample", "begin judge", "end judge",
    ]  # fmt: skip
    assert "end sample" not in killed[: killed.index("begin judge")]  # both were at work
    assert [(r.step, r.expected, r.lost, r.doubled, r.equal) for r in results] == [
        ("sample", 16, 0, 0, True),
        ("judge", 64, 0, 0, True),
        ("monte_carlo", results[2].expected, 0, 0, True),
    ]
    assert results[2].expected > 0
    assert experiment.answers.paid_twice == 0
    # Of the judge's two actors, eight calls each, with the driver and with the machine.
    assert 0 <= experiment.answers.lost <= 2 * 2 * 8


def test_a_scripted_policy_goes_on_where_a_search_has_begun() -> None:
    policy = ScriptedGenerator("", VllmEngine(), 0.0)
    prompt = ChatPrompt(({"role": "user", "content": "What is wide?"},))

    def written(said: str, *stop: str) -> list[str]:
        asked = replace(prompt, prefix=said)
        return [c.text for c in asyncio.run(policy.generate(asked, 4, 0, Sampling(1.0, 0, 1.0, 99, stop)))]

    first = written("Step 1:", "Step 2:")
    assert len(set(first)) > 1
    assert all(text.startswith(" Look at the heart") and text.endswith(".\nStep 2:") for text in first)
    rest = written("Step 1: Look.\nStep 2:")
    assert all(len(split_steps("Step 2:" + text)[1]) == 2 for text in rest)
    assert all(extract_answer(text, list("abcd")) for text in rest)
    assert written("Step 1: Look.\nStep 2: Wide.\nStep 3: So?\nStep 4:")[0].startswith(" The answer is (")
    assert all(len(split_steps(text)[1]) == 3 for text in written(""))


def test_the_scripted_api_writes_questions_that_differ_and_solves_them() -> None:
    def body(schema: Mapping[str, Any], seed: int) -> dict[str, Any]:
        shape = {"type": "json_schema", "json_schema": {"schema": schema}}
        return {"messages": [{"content": [{"text": "The image:"}]}], "response_format": shape, "seed": seed}

    one, two = (draft(reply_to(body(SCHEMA, seed))) for seed in (0, 1))
    assert not repeats(one.question, [two.question])
    assert {letter(reply_to(body(SOLVE_SCHEMA, seed)), one.options) for seed in range(40)} == set("ABCD")


def test_faults_are_drawn_from_the_seed_and_spread_over_all_steps_and_kinds_in_turn() -> None:
    config = BenchConfig(faults=8, kinds=("actor", "driver"), steps=("ingest", "sample"))
    faults = plan(config, Random(7))
    assert faults == plan(config, Random(7))
    assert faults != plan(config, Random(8))
    pairs = {("actor", "sample"), ("driver", "sample"), ("driver", "ingest")}  # ingest has no actors
    assert (
        {(fault.kind, fault.step) for fault in faults[:3]}
        == {(fault.kind, fault.step) for fault in faults[3:6]}
        == pairs
    )
    assert all(0 < fault.share < 1 for fault in faults)
    twenty = plan(BenchConfig(), Random(0))
    assert {fault.step for fault in twenty} == set(BenchConfig().steps)
    assert {fault.kind for fault in twenty} == set(BenchConfig().kinds)


def trained(folder: Path, losses: list[float]) -> str:
    folder.mkdir()
    updates = [{"loss": loss, "rate": 1.0} for loss in losses]
    (folder / "history.json").write_text(json.dumps({"updates": updates, "epochs": []}))
    return str(folder)


def test_a_training_is_compared_by_its_curve(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", [3.0, 2.0, 1.0])
    compared = {}
    for name, losses in {
        "same": [3.0, 2.00009, 1.0],
        "other": [3.0, 2.0002, 1.0],
        "short": [3.0, 2.0],
        "long": [3.0, 2.0, 1.0, 0.5],
    }.items():
        result = curves("node-0", "train_policy", base, trained(tmp_path / name, losses))
        compared[name] = (result.expected, result.lost, result.doubled, result.equal)
    assert compared == {
        "same": (3, 0, 0, True),
        "other": (3, 0, 0, False),
        "short": (3, 1, 0, False),
        "long": (3, 0, 1, False),
    }


def test_a_training_with_faults_is_elastic_and_the_others_are_given(tmp_path: Path) -> None:
    config = BenchConfig(nodes=3, kinds=("worker", "drain"), steps=("train_policy", "sample"))
    with in_thread(ScriptedApi(0.0)) as api:
        recipe = load_recipe(ResumeExperiment(config, tmp_path, api, Console()).recipe("node-0"))
    assert recipe.models.policy is None
    assert recipe.models.image_tower == "scripted"
    assert (recipe.train_policy.num_workers, recipe.train_policy.min_workers) == (2, 1)
    assert ("actor", "train_policy") not in [(f.kind, f.step) for f in plan(BenchConfig(steps=config.steps), Random(0))]
    with pytest.raises(ValidationError, match="with nodes > 1 the loss of a raylet is that of its machine"):
        BenchConfig(nodes=3)
    assert set(load(BenchConfig, None, ["nodes=3"]).kinds) == {"worker", "actor", "driver", "ctrl-c", "node", "drain"}


STEPS = """
import subprocess, sys, time
from pathlib import Path
done = Path(sys.argv[1])
subprocess.Popen(["sleep", "60"])  # what outlives its driver
for name in ("one", "two"):
    if not (done / name).exists():
        print("begin", name, flush=True)
        time.sleep(0.5)
        (done / name).touch()
        print("end", name, flush=True)
sys.exit(len(sys.argv) - 2)
"""


class Program:
    """A driver of two steps of half a second, without Ray."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.more = folder, more
        self.drivers: list[Driver] = []

    def __call__(self, number: int, cluster: PreemptibleCluster | None) -> Driver:
        command = [sys.executable, "-c", STEPS, str(self.folder), *self.more]
        self.drivers.append(Driver(command, {}, self.folder / f"{number}.log"))
        return self.drivers[-1]


def test_faults_hit_a_driver_in_their_step_and_it_is_started_until_it_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, lines = Program(tmp_path), list[str]()
    faults = [Fault("driver", "one", 0.2), Fault("ctrl-c", "two", 0.5), Fault("driver", "two", 100.0)]
    outcome = FaultInjector(faults, {"one": 0.5, "two": 0.5}, Random(0), lines.append).run(program)
    assert outcome.injected == faults[:2]  # the third came too late
    assert [driver.process.returncode for driver in program.drivers] == [-9, -2, 0]
    assert outcome.starts == 3
    assert outcome.step_seconds["two"] >= 0.4
    assert [words.partition(" at ")[0] for words in lines] == ["driver", "ctrl-c"]
    monkeypatch.setattr(fault_injection, "GRACE_S", 0.1)
    # An interrupt reaches the whole group, and ends the second.
    assert kill_survivors(program.drivers) == ["sleep 60"] * 2
    assert kill_survivors(program.drivers) == []


def test_a_driver_that_fails_by_itself_is_said(tmp_path: Path) -> None:
    program = Program(tmp_path, "fail")
    with pytest.raises(RuntimeError, match="ended with code 1 and no fault was injected"):
        FaultInjector([], {}, Random(0), print).run(program)
    for driver in program.drivers:
        os.killpg(driver.process.pid, signal.SIGKILL)


async def _answer_twice(folder: Path) -> None:
    answer = PricedAnswer(
        ChatReply(choices=(ChatChoice("1 high", "stop"),), prompt_tokens=1, cached_tokens=0, completion_tokens=1), 0.1
    )
    for _ in range(2):
        store = AnswerStore(f"{folder}/api/model/answers")
        await store.put("q", "twice", answer)
    await store.put("q", "once", answer)


def test_an_answer_that_is_kept_twice_is_seen(tmp_path: Path) -> None:
    asyncio.run(_answer_twice(tmp_path))
    assert stored_answers(tmp_path) == {"twice": 2, "once": 1}
