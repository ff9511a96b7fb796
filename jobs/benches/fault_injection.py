"""Fault injection: a driver under watch, the processes of its Ray, and what is done to them in the middle of a step.

A driver is started in a session of its own (setsid), which all of its processes keep whoever their parent is: so a
worker to kill is found, and so is what outlives its driver.
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
from typing import Any, Literal, get_args

import psutil

from medmm_ray.session import fresh_token

Kind = Literal["worker", "actor", "driver", "ctrl-c", "raylet", "node", "drain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RAYLET = "raylet"  # Ray's name for the process of a machine that starts all others
FATAL: tuple[Kind, ...] = ("driver", "ctrl-c", "raylet")  # the driver ends too: the one it is connected to is gone
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # not workers: a raylet ends with them
OF_A_CLUSTER: tuple[Kind, ...] = ("node", "drain")  # a machine goes away, and another one comes
NOTICE_S = 5.0  # between a preemption's notice and the end of the machine; clouds give 30 s and more
GRACE_S = 90.0  # for what a driver leaves behind to end by itself: Ray's agents take up to a minute to miss theirs
STALL_S = 240.0  # a driver that prints nothing new for so long hangs
POLL_S = 0.02  # between two looks at a driver; the shortest step takes a fifth of a second


@dataclass(frozen=True)
class Fault:
    """A fault of a `kind`, injected into `step` after a `share` of the seconds that the step takes undisturbed."""

    kind: Kind
    step: str
    share: float


@dataclass
class Outcome:
    """What became of a run into which faults were injected."""

    injected: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 0
    step_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds from each step's last beginning to its end."""


class Driver:
    """A process that runs steps and prints when each begins (``begin NAME``) and ends (``end NAME``)."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.step_seconds: dict[str, float] = {}
        self.step_starts: dict[str, float] = {}
        """When each step began last, by the monotonic clock."""
        self._read_chars = 0
        self._running: set[str] = set()
        self._last_line = time.monotonic()
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_as_in_a_terminal,
            )

    def steps(self) -> dict[str, float]:
        """The seconds since they began of the steps in progress.

        Raises RuntimeError where the driver hangs.
        """
        now = time.monotonic()
        output = self.log.read_text(errors="replace")
        # A line may be half written: only whole ones count.
        new_lines = output[self._read_chars : output.rfind("\n") + 1]
        self._read_chars += len(new_lines)
        for line in new_lines.splitlines():
            word, _, name = line.partition(" ")
            if word == "begin":
                self.step_starts[name] = self._last_line = now
                self._running.add(name)
            elif word == "end":
                self.step_seconds[name] = now - self.step_starts[name]
                self._running.remove(name)
                self._last_line = now
        if now - self._last_line > STALL_S:
            raise RuntimeError(f"the driver hangs in {', '.join(self._running)}:\n{output[-3000:]}")
        return {name: now - self.step_starts[name] for name in self._running}

    def processes(self) -> list[psutil.Process]:
        """All processes of its session but itself."""
        return session_processes(self.process.pid)


def _as_in_a_terminal() -> None:
    """A shell script's background jobs ignore Ctrl-C, and so does what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def session_processes(leader: int) -> list[psutil.Process]:
    """The processes of the session that `leader` leads or led, without it."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader != process.pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def targets(kind: Kind, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes of a driver's Ray: those that run an actor of its step, its other workers, or its raylet."""
    matching = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            # Ray sets the title of a worker to what it runs.
            title = " ".join(process.cmdline()).strip()
            is_actor = title.startswith("ray::MapWorker")
            is_worker = title.startswith("ray::") and title not in AGENTS and not is_actor
            is_kind = {"actor": is_actor, "worker": is_worker, "raylet": process.name() == "raylet"}
            if is_kind[kind]:
                matching.append(process)
    return sorted(matching, key=lambda process: process.pid)


def await_workers_end(leader: int) -> None:
    """Wait until no Ray worker is left of the session of `leader`, which is dead: until then its actors go on asking.

    Raises RuntimeError after a grace.
    """
    deadline = time.monotonic() + GRACE_S
    while True:
        processes = session_processes(leader)
        workers = targets("worker", processes) + targets("actor", processes)
        if not workers:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{workers} outlive their driver, {leader}, by more than {GRACE_S:g} s")
        time.sleep(0.05)


def kill_survivors(drivers: Sequence[Driver]) -> list[str]:
    """Kill the processes that outlive their driver by more than a grace; returns their command lines."""
    deadline = time.monotonic() + GRACE_S
    while (survivors := _all_processes(drivers)) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = []
    for process in survivors:
        with suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[:80].strip())
            process.kill()
    return names


def _all_processes(drivers: Sequence[Driver]) -> list[psutil.Process]:
    processes = []
    for driver in drivers:
        processes += driver.processes()
    return processes


class PreemptibleCluster:
    """A Ray cluster of a small head and machines that do the work, which can be taken away and are replaced."""

    def __init__(self, num_machines: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self._token = ExitStack()
        self._token.enter_context(fresh_token())  # the drivers inherit it
        # Ray's own defaults take half a minute to miss a machine, longer than a step of the bench.
        fast_health_checks = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": fast_health_checks},
        )
        self.address: str = self.cluster.address
        self._num_cpus = max(4, 8 // num_machines)
        self._machines = [self._new_machine() for _ in range(num_machines)]

    def _new_machine(self) -> Any:
        return self.cluster.add_node(num_cpus=self._num_cpus)

    def preempt(self, rng: random.Random, notice_s: float = 0.0) -> None:
        """Take a machine away from one moment to the next, or after a notice; a new one comes."""
        machine = self._machines.pop(rng.randrange(len(self._machines)))
        if notice_s:
            self._announce_end(machine, notice_s)
            self._machines.append(self._new_machine())
            time.sleep(notice_s)
            self.cluster.remove_node(machine, allow_graceful=False)
            return
        self.cluster.remove_node(machine, allow_graceful=False)
        self._machines.append(self._new_machine())

    def _announce_end(self, machine: Any, notice_s: float) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

        deadline_ms = int((time.time() + notice_s) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = GcsClient(address=self.address)
        is_accepted, refusal = client.drain_node(machine.node_id, reason, "the bench takes it away", deadline_ms)
        if not is_accepted:
            raise RuntimeError(f"Ray refused to drain a machine: {refusal}")

    def processes(self) -> list[psutil.Process]:
        """Those of its machines, without the head's."""
        processes = []
        for machine in self._machines:
            for info in machine.all_processes[RAYLET]:
                raylet = psutil.Process(info.process.pid)
                processes += [raylet, *raylet.children(recursive=True)]
        return processes

    def close(self) -> None:
        """Stop the cluster."""
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        self._token.close()


def inject(kind: Kind, driver: Driver, cluster: PreemptibleCluster | None, rng: random.Random) -> str | None:
    """Inject a fault now; the title of what it hit, or None where there is no process yet that it could hit."""
    if kind == "driver":
        driver.process.kill()
        return "the driver"
    if kind == "ctrl-c":
        os.killpg(driver.process.pid, signal.SIGINT)
        return "the driver's group"
    if kind in OF_A_CLUSTER:
        assert cluster is not None
        cluster.preempt(rng, NOTICE_S if kind == "drain" else 0.0)
        return "a machine"
    processes = targets(kind, cluster.processes() if cluster else driver.processes())
    if not processes:
        return None
    victim = rng.choice(processes)
    title = " ".join(victim.cmdline()).strip()
    victim.kill()
    return title[:80]


class FaultInjector:
    """Runs a driver again and again until it ends well, and injects faults on the way.

    A fault whose step is over too soon is not injected. `undisturbed` gives the seconds that each step takes. With
    `num_machines` the driver joins a cluster of so many, beside a head; without, only for faults that need one.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        undisturbed: Mapping[str, float],
        rng: random.Random,
        log: Callable[[str], None],
        num_machines: int = 0,
    ) -> None:
        self.num_machines = num_machines
        self.pending = list(faults)
        self.undisturbed = undisturbed
        self.rng = rng
        self.log = log
        self.cluster: PreemptibleCluster | None = None

    def run(self, start: Callable[[int, PreemptibleCluster | None], Driver]) -> Outcome:
        """Run what ``start(number of starts before, cluster)`` starts.

        Raises RuntimeError where the driver fails and no fault explains it.
        """
        if self.num_machines or any(fault.kind in OF_A_CLUSTER for fault in self.pending):
            self.cluster = PreemptibleCluster(max(1, self.num_machines))
        try:
            return self._run_until_done(start)
        finally:
            if self.cluster:
                self.cluster.close()

    def _run_until_done(self, start: Callable[[int, PreemptibleCluster | None], Driver]) -> Outcome:
        outcome = Outcome()
        code = -1
        while code != 0:
            start_time = time.monotonic()
            driver = start(outcome.starts, self.cluster)
            is_killed = self._watch(driver, outcome)
            outcome.seconds += time.monotonic() - start_time
            outcome.starts += 1
            outcome.step_seconds |= driver.step_seconds
            code = driver.process.returncode
            if code != 0 and not is_killed:
                output = driver.log.read_text()[-3000:]
                raise RuntimeError(f"the driver ended with code {code} and no fault was injected:\n{output}")
        return outcome

    def _watch(self, driver: Driver, outcome: Outcome) -> bool:
        """Wait for the driver's end and inject what is due; whether the last fault was meant to end it."""
        is_killed = False
        while driver.process.poll() is None:
            fault = self._inject_due(driver)
            if fault is not None:
                outcome.injected.append(fault)
                self.pending.remove(fault)
                is_killed = fault.kind in FATAL
                if is_killed:
                    driver.process.wait(timeout=60)
            time.sleep(POLL_S)
        driver.steps()  # its last lines
        return is_killed

    def _inject_due(self, driver: Driver) -> Fault | None:
        """Inject the first fault whose moment in a present step has come."""
        seconds = driver.steps()
        for fault in self.pending:
            step = fault.step
            is_due = step in seconds and seconds[step] >= fault.share * self.undisturbed[step]
            victim = inject(fault.kind, driver, self.cluster, self.rng) if is_due else None
            if victim is not None:
                self.log(f"{fault.kind} at {seconds[step]:.2f} s of {step}: {victim}")
                return fault
        return None
