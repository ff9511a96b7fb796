"""Blows at a run: a driver under watch, the processes of its Ray, and what is done to them in the middle of a step.

A driver is started in a session of its own (setsid), which all of its processes keep whoever their parent is: so a
worker to kill is found, and what outlives its driver.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import psutil

from medmm_ray.session import fresh_token

Kind = Literal["worker", "actor", "driver", "ctrl-c", "raylet", "node"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FATAL: tuple[Kind, ...] = ("driver", "ctrl-c", "raylet")  # the driver ends too: the one it is connected to is gone
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # not workers: a raylet ends with them
GRACE_S = 90.0  # for what a driver leaves behind to end by itself: Ray's agents take up to a minute to miss theirs
PATIENCE_S = 240.0  # a driver that says nothing new for so long hangs


@dataclass(frozen=True)
class Blow:
    """`kind` strikes `step` after a `share` of the seconds that it takes undisturbed."""

    kind: Kind
    step: str
    share: float


@dataclass
class Endured:
    """What became of a run under blows."""

    landed: list[Blow] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 0
    lasted: dict[str, float] = field(default_factory=dict)
    """Seconds from each step's last beginning to its end."""


class Driver:
    """A process that runs steps and says of each when it begins and ends."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._read = 0
        self._step = ""
        self._since = self._heard = self.started = time.monotonic()
        self.lasted: dict[str, float] = {}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_as_in_a_terminal,
            )  # fmt: skip

    def step(self) -> tuple[str, float]:
        """The step in progress, empty between two, and the seconds since it began."""
        now = time.monotonic()
        said = self.log.read_text(errors="replace")
        whole = said[self._read : said.rfind("\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            word, _, name = line.partition(" ")
            if word == "begin":
                self._step, self._since, self._heard = name, now, now
            elif word == "end" and name == self._step:
                self.lasted[name] = now - self._since
                self._step, self._heard = "", now
        if now - self._heard > PATIENCE_S:
            raise RuntimeError(f"the driver hangs in {self._step!r}:\n{said[-3000:]}")
        return self._step, now - self._since

    def processes(self) -> list[psutil.Process]:
        """All processes of its session but itself."""
        return followers(self.process.pid)


def followers(leader: int) -> list[psutil.Process]:
    """The processes of the session that `leader` leads or led, without it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader != process.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def await_workers_end(leader: int) -> None:
    """Wait until no Ray worker is left of the session of `leader`, which is dead: until then its actors go on asking.

    Raises RuntimeError after a grace.
    """
    deadline = time.monotonic() + GRACE_S
    while found := victims("worker", followers(leader)) + victims("actor", followers(leader)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} outlive their driver, {leader}, by more than {GRACE_S:g} s")
        time.sleep(0.05)


def left_behind(drivers: Sequence[Driver]) -> list[str]:
    """The processes that outlive their driver, after a grace; they are killed."""
    deadline = time.monotonic() + GRACE_S
    while (left := [p for d in drivers for p in d.processes()]) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = []
    for process in left:
        with suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[:80].strip())
            process.kill()
    return names


def _as_in_a_terminal() -> None:
    """A shell script's background jobs ignore Ctrl-C, and so does what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def victims(kind: Kind, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes of a driver's Ray: those that run an actor of its step, its other workers, or its raylet."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline()).strip()
            actor, worker = title.startswith("ray::MapWorker"), title.startswith("ray::") and title not in AGENTS
            chosen = {"actor": actor, "worker": worker and not actor, "raylet": process.name() == "raylet"}
            if chosen[kind]:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


class Spot:
    """A Ray cluster of a small head and one machine that does the work, which can be taken away and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._token = ExitStack()
        self._token.enter_context(fresh_token())  # the drivers inherit it
        fast = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": fast},
        )
        self.address: str = self.cluster.address
        self._machine = self.cluster.add_node(num_cpus=8)

    def strike(self) -> None:
        """The machine is gone from one moment to the next; a new one comes."""
        self.cluster.remove_node(self._machine, allow_graceful=False)
        self._machine = self.cluster.add_node(num_cpus=8)

    def close(self) -> None:
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        self._token.close()


def strike(kind: Kind, driver: Driver, spot: Spot | None, rng: random.Random) -> bool:
    """Strike now; False where there is nothing to strike yet."""
    if kind == "driver":
        driver.process.kill()
    elif kind == "ctrl-c":
        os.killpg(driver.process.pid, signal.SIGINT)
    elif kind == "node":
        assert spot is not None
        spot.strike()
    else:
        found = victims(kind, driver.processes())
        if not found:
            return False
        rng.choice(found).kill()
    return True


def endure(
    start: Callable[[int, Spot | None], Driver], blows: Sequence[Blow], undisturbed: Mapping[str, float],
    rng: random.Random, told: Callable[[str], None],
) -> Endured:  # fmt: skip
    """Start the driver until it ends well, and deal it the blows; one whose step is over too soon does not land.

    Raises RuntimeError where the driver ends with a fault that no blow explains.
    """
    found = Endured()
    due = list(blows)
    spot = Spot() if any(blow.kind == "node" for blow in blows) else None
    try:
        code = -1
        while code != 0:
            began = time.monotonic()
            driver = start(found.starts, spot)
            ended = _watch(driver, due, undisturbed, spot, rng, found, told)
            found.seconds += time.monotonic() - began
            found.starts += 1
            found.lasted |= driver.lasted
            code = driver.process.returncode
            if code != 0 and not ended:
                raise RuntimeError(
                    f"the driver ended with code {code} and nothing was done to it:\n{driver.log.read_text()[-3000:]}"
                )
    finally:
        if spot:
            spot.close()
    return found


def _watch(
    driver: Driver, due: list[Blow], undisturbed: Mapping[str, float], spot: Spot | None, rng: random.Random,
    found: Endured, told: Callable[[str], None],
) -> bool:  # fmt: skip
    """Wait for the driver's end and deal the blows that are due; whether one was meant to end it."""
    ended = False
    while driver.process.poll() is None:
        step, seconds = driver.step()
        for blow in due:
            if blow.step == step and seconds >= blow.share * undisturbed[step] and strike(blow.kind, driver, spot, rng):
                told(f"{blow.kind} at {seconds:.2f} s of {step}")
                found.landed.append(blow)
                due.remove(blow)
                ended = blow.kind in FATAL
                if ended:
                    driver.process.wait(timeout=60)
                break
        time.sleep(0.02)
    driver.step()
    return ended
