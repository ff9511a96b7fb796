"""Steps that run in order, and two at a time where one can follow the other: labels of a question are judged while the
next one is sampled, so that GPUs and APIs work at once.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jobs.graph import MAKER, Step
from jobs.recipe import judges
from jobs.step import Job, Run, run_step
from medmm_ray.data.handover import Handover
from medmm_ray.steps.judge import JudgeApi


class Watcher(Protocol):
    """What is told of steps, also from another thread."""

    def start(self, step: Step, job: Job) -> None:
        """A step runs from now on."""

    def finish(self, step: Step, state: str) -> None:
        """A step is done."""

    def fail(self, step: Step, state: str) -> None:
        """A step has failed or was interrupted."""


def run_steps(run: Run, steps: Sequence[Step], watcher: Watcher) -> Iterator[Step]:
    """Run steps in the present Ray session, in order, some beside each other; gives each when it is done."""
    remaining = list(steps)
    while remaining:
        step = remaining.pop(0)
        follower = remaining[0] if remaining and can_follow(run, remaining[0], step) else None
        if follower is None:
            _run(run, step, watcher)
            yield step
        else:
            remaining.pop(0)
            _run_together(run, step, follower, watcher)
            yield from (step, follower)


def can_follow(run: Run, step: Step, upstream: Step) -> bool:
    """Whether `step` may work on what `upstream` is still making.

    A judge that computes here waits: it would take machines from the sampler, or could not start before its end.
    """
    if not run.recipe.overlap or step.follows is None or MAKER[step.follows] != upstream:
        return False
    return all(isinstance(judge.engine, JudgeApi) for judge in judges(run.recipe).values())


def _run(run: Run, step: Step, watcher: Watcher, handover: Handover | None = None) -> None:
    try:
        run_step(run, step, lambda job: watcher.start(step, job), handover)
    except BaseException as error:  # Ctrl-C too: the board shows where it hit
        watcher.fail(step, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    watcher.finish(step, "done")


@dataclass
class _Follower:
    """A step in a thread of its own, which begins when there is something to read."""

    run: Run
    step: Step
    watcher: Watcher
    handover: Handover
    error: Exception | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # A daemon: Ctrl-C ends the program, and what the thread waits for with it.
        self.thread = threading.Thread(target=self._work, name=self.step.name, daemon=True)

    def _work(self) -> None:
        self.handover.has_begun.wait()
        # A step that fails for want of its upstream says nothing of its own.
        if self.handover.is_empty and self.handover.has_failed:
            return
        try:
            _run(self.run, self.step, self.watcher, self.handover)
        except Exception as error:  # noqa: BLE001 - raised by the other thread
            self.error = error


def _run_together(run: Run, upstream: Step, step: Step, watcher: Watcher) -> None:
    """Run a step and the one that follows it; a fault of either is raised when both have ended.

    What is written stays in any case: an upstream goes on where its follower fails, a follower works off what it was
    handed where its upstream does.
    """
    assert step.follows is not None
    handover = Handover(step.follows)
    follower = _Follower(run, step, watcher, handover)
    follower.thread.start()
    try:
        _run(run, upstream, watcher, handover)
    except Exception:
        handover.end(has_failed=True)
        follower.thread.join()
        raise
    handover.end()
    follower.thread.join()
    if follower.error is not None:
        raise follower.error
