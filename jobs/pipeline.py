"""All steps of a recipe in one Ray session: ``python -m jobs.pipeline recipe.yaml [--from STEP] [--until STEP]``.

What is complete is skipped and what was interrupted resumes, so that the same command is also the way to go on after
Ctrl-C, a crash or a changed setting.
"""

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from jobs.entry import add_range, launch, parser, read_arguments
from jobs.graph import BY_NAME, Step, steps_between
from jobs.overlap import run_steps
from jobs.preflight import require
from jobs.recipe import Recipe
from jobs.resources import ResourceSampler
from jobs.step import Job, Run
from medmm_ray.config import ConfigError
from medmm_ray.data.artifacts import read_file
from medmm_ray.data.json_documents import from_json
from medmm_ray.data.tables import filesystem, read_json, write_file

HEARTBEAT_S = 30  # between two lines of a log while a step runs
STYLES = {"running": "bold cyan", "done": "green", "complete": "dim", "left out": "dim", "failed": "bold red"}
log = logging.getLogger("medmm_ray")


@dataclass
class StepStatus:
    """One line of the board: a step's state, and what its manifests say when it is done."""

    step: Step
    state: str = "waiting"
    rows: int | None = None
    seconds: float | None = None
    note: str = ""


class Board:
    """The live table of steps; on a screen it redraws itself, elsewhere (a job's log, CI) it prints a line a change."""

    def __init__(self, run: Run, steps: Sequence[Step], console: Console) -> None:
        self.run = run
        self.statuses = {step.name: StepStatus(step) for step in steps}
        self.console = console
        self._jobs: dict[str, Job] = {}  # those that run, with their beginnings
        self._started: dict[str, float] = {}
        self._done = threading.Event()

    def live(self) -> "Live | nullcontext[None]":
        """The context in which the table is shown."""
        if self.console.is_terminal:
            return Live(get_renderable=self.render, console=self.console, refresh_per_second=1, transient=False)
        # A log without a line for minutes looks like a job that hangs.
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()
        return nullcontext()

    def start(self, step: Step, job: Job) -> None:
        """A step runs from now on."""
        self._started[step.name] = time.monotonic()
        self._jobs[step.name] = job
        self._change(step, "running")

    def finish(self, step: Step, state: str) -> None:
        """A step is done, or was complete already."""
        status = self.statuses[step.name]
        errors: list[str] = []
        num_rows, seconds = 0, 0.0
        for manifest in self.run.manifests(step):
            num_rows += manifest.rows
            seconds += manifest.seconds
            errors += [f"{kind}: {count} failed" for kind, count in manifest.errors.items()]
        # An artifact, such as a model, has no rows to tell of.
        status.rows, status.seconds = num_rows or None, seconds
        status.note = ", ".join(errors)
        job = self._jobs.pop(step.name, None)
        self._change(step, state)
        for line in job.notes if job else ():
            self.console.print(f"  {step.name}: {line}", style=None, markup=False, highlight=False, soft_wrap=True)

    def skip(self, step: Step) -> None:
        """A step is left out."""
        self._change(step, "left out")

    def fail(self, step: Step, state: str) -> None:
        """A step has failed or was interrupted."""
        self._jobs.pop(step.name, None)
        self._change(step, state)

    def _change(self, step: Step, state: str) -> None:
        status = self.statuses[step.name]
        status.state = state
        if self.console.is_terminal:
            return
        rows = f"{status.rows:,} rows" if status.rows else ""
        seconds = f"{status.seconds:8.1f} s" if status.seconds is not None else ""
        line = f"{step.name:<18}{state:<12}{rows:>16}{seconds:>12}  {status.note}"
        self.console.print(line.rstrip(), style=None)

    def _heartbeat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            for name, job in list(self._jobs.items()):
                elapsed = time.monotonic() - self._started[name]
                self.console.print(f"{name:<18}{elapsed:8.0f} s  {job.progress()}")

    def close(self) -> None:
        """End the heartbeat."""
        self._done.set()

    def render(self) -> Group:
        """The table as it stands now."""
        grid = Grid("step", "what", "state", box=None, pad_edge=False, header_style="bold")
        grid.add_column("rows", justify="right")
        grid.add_column("seconds", justify="right")
        grid.add_column("waiting for")
        for status in self.statuses.values():
            step, note, seconds = status.step, status.note, status.seconds
            if (job := self._jobs.get(step.name)) is not None:
                note, seconds = job.progress(), time.monotonic() - self._started[step.name]
            state = Text(status.state, STYLES.get(status.state, ""))
            rows = f"{status.rows:,}" if status.rows else ""
            time_taken = "" if seconds is None else f"{seconds:.1f}"
            grid.add_row(step.name, step.what, state, rows, time_taken, note)
        return Group(grid)


def run_pipeline(recipe: Recipe, steps: Sequence[Step], console: Console) -> Run:
    """Run `steps` in one Ray session; none is started if all are complete."""
    run = Run(recipe)
    board = Board(run, steps, console)
    todo = []
    # What is complete shows at once; APIs and checkpoints are checked before Ray starts.
    with board.live():
        for step in steps:
            if run.skipped(step):
                board.skip(step)
            elif run.is_complete(step):
                run.point(step)
                board.finish(step, "complete")
            else:
                todo.append(step)
        if todo:
            require(run, todo, lambda note: _print_note(console, note))
            _run_steps(run, todo, board)
    board.close()
    return run


def _print_note(console: Console, note: str) -> None:
    console.print(f"note: {note}", style=None, markup=False, highlight=False, soft_wrap=True)


def _run_steps(run: Run, steps: Sequence[Step], board: Board) -> None:
    from medmm_ray.session import session

    with ResourceSampler() as resources, session():
        started = time.monotonic()
        for step in run_steps(run, steps, board):
            _write_usage(run, step, resources, time.monotonic() - started)


def _write_usage(run: Run, last: Step, resources: ResourceSampler, seconds: float) -> None:
    """Write what the run has used so far beside its tables; the report of a later session does not change it.

    On a cluster the work is done by processes that are not ours to measure.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    # Written after each step, so that a run that is killed has its figures too.
    fs, path = filesystem(f"{run.root}/usage.json")
    usage = {
        "until": last.name,
        "seconds": round(seconds, 1),
        "core_minutes": round(resources.core_minutes, 2),
        "peak_pss_gib": round(resources.peak_gib, 2),
    }
    write_file(fs, path, json.dumps(usage, indent=2).encode())


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.pipeline``."""
    arguments = parser("pipeline", "All steps of a recipe, resumable.")
    add_range(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="validate, plan, and estimate cost and GPU-hours")
    arguments.add_argument(
        "--check", action="store_true", help="with --dry-run: ask each API once, and look at each checkpoint"
    )
    return launch(arguments, words, _main, Recipe)


def _main(parsed: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    recipe = read_arguments(parsed, section=None)
    steps = steps_between(parsed.first, parsed.last)
    if parsed.dry_run:
        from jobs.plan import print_plan

        print_plan(recipe, steps, console)
        if parsed.check:
            require(Run(recipe), steps, lambda note: _print_note(console, note))
            console.print("checked: every API answers, and every checkpoint is there", highlight=False)
        return 0
    if parsed.check:
        raise ConfigError("--check goes with --dry-run; a run checks before it starts anyway")
    started = time.monotonic()
    run = run_pipeline(recipe, steps, console)
    print_summary(run, steps, console, time.monotonic() - started)
    return 0


def print_summary(run: Run, steps: Sequence[Step], console: Console, seconds: float) -> None:
    """Where everything lies, the dataset's gates, and the report's headline."""
    places = Grid(box=None, show_header=False, pad_edge=False)
    for step in steps:
        if not run.skipped(step):
            for name in step.makes:
                places.add_row(name, run.uri(name))
    console.print("\n[bold]Where everything lies[/bold]", places)
    if figures := read_json(f"{run.root}/usage.json"):
        minutes, core_minutes, peak_gib = figures["seconds"] / 60, figures["core_minutes"], figures["peak_pss_gib"]
        console.print(
            f"\n{seconds:.0f} s now; the last working session: {minutes:.1f} min, "
            f"{core_minutes:.1f} core-minutes, at most {peak_gib:.1f} GiB (PSS)"
        )
    if content := _report_of(run, "audit", "dataset_report", steps):
        from medmm_ray.pages.dataset_page import lead
        from medmm_ray.steps.audit import AuditReport

        dataset = from_json(AuditReport, content)
        words = lead(dataset).removeprefix("The dataset ")
        console.print(f"\ndataset: {words}\nreport: {run.root}/dataset_report.html", highlight=False)
    if content := _report_of(run, "evaluate", "report", steps):
        from medmm_ray.pages.report import summary
        from medmm_ray.steps.evaluate import EvaluationReport

        report = from_json(EvaluationReport, content)
        console.print("", summary(report), f"\nreport: {run.root}/report.html")


def _report_of(run: Run, step_name: str, report: str, steps: Sequence[Step]) -> bytes | None:
    """The report of a step at the top of the run's folder; None where the step is none of `steps` or left out."""
    step = BY_NAME[step_name]
    return None if step not in steps or run.skipped(step) else read_file(*filesystem(f"{run.root}/{report}.json"))


if __name__ == "__main__":
    sys.exit(main())
