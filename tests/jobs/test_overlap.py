"""Which steps run beside each other, and what becomes of one where the other fails."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import overlap
from jobs.graph import BY_NAME, STEPS, Step
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.handover import Handover
from medmm_ray.data.records import Vector
from medmm_ray.data.tables import Table, TableError

TINY = "jobs/recipes/tiny.yaml"
API = ("judge.engine.kind=openai", "judge.engine.model=gpt-4o")
PAIR = [BY_NAME["sample"], BY_NAME["judge"]]


def run(folder: Path, *words: str) -> Run:
    return Run(load_recipe([TINY, f"run={folder}", *words]))


class Board:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, step: Step, job: Job) -> None:
        self.lines.append(f"start {step.name}")

    def finish(self, step: Step, state: str) -> None:
        self.lines.append(f"{state} {step.name}")

    def fail(self, step: Step, state: str) -> None:
        self.lines.append(f"{state} {step.name}")


Work = Callable[[Handover | None], None]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, Work]:
    """What the steps do, by name, in place of their jobs."""
    work_of: dict[str, Work] = {}

    def run_step(run: Run, step: Step, started: Callable[[Job], None], handover: Handover | None = None) -> None:
        started(Job(run, step, handover))
        work_of[step.name](handover)

    monkeypatch.setattr(overlap, "run_step", run_step)
    return work_of


def test_a_judge_behind_an_api_follows_the_sampler_and_one_that_computes_here_does_not(tmp_path: Path) -> None:
    sample, judge = PAIR
    assert overlap.can_follow(run(tmp_path, *API), judge, sample)
    assert not overlap.can_follow(run(tmp_path, *API, "overlap=false"), judge, sample)
    assert not overlap.can_follow(run(tmp_path), judge, sample)  # the phantoms' own
    assert not overlap.can_follow(run(tmp_path, "judge.engine.kind=vllm"), judge, sample)
    assert not overlap.can_follow(run(tmp_path, *API, "second_judge.engine.kind=vllm"), judge, sample)
    followers = {
        (step.name, upstream.name)
        for step in STEPS
        for upstream in STEPS
        if overlap.can_follow(run(tmp_path, *API), step, upstream)
    }
    assert followers == {("judge", "sample")}


def test_no_fingerprint_depends_on_overlap(tmp_path: Path) -> None:
    together, apart = run(tmp_path, *API), run(tmp_path, *API, "overlap=false")
    assert [together.fingerprint(step) for step in STEPS] == [apart.fingerprint(step) for step in STEPS]


def test_a_follower_begins_with_the_first_rows_and_ends_after_its_upstream(
    tmp_path: Path, work: dict[str, Work]
) -> None:
    judging, board = threading.Event(), Board()

    def sample(handover: Handover | None) -> None:
        assert handover is not None
        handover.begin(Table(f"{tmp_path}/t", Vector), Vector, [], "item_id", 8)
        assert board.lines == ["start sample"]
        handover.has_begun.set()
        assert judging.wait(timeout=30)

    def judge(handover: Handover | None) -> None:
        assert handover is not None
        judging.set()
        while not Path(handover._end_path).exists():
            time.sleep(0.01)

    work |= {"sample": sample, "judge": judge}
    done = list(overlap.run_steps(run(tmp_path / "run", *API), PAIR, board))
    assert done == PAIR
    assert board.lines == ["start sample", "start judge", "done sample", "done judge"]


def test_steps_that_do_not_overlap_run_one_after_the_other(tmp_path: Path, work: dict[str, Work]) -> None:
    board = Board()
    work |= {"sample": lambda handover: None, "judge": lambda handover: None}
    assert list(overlap.run_steps(run(tmp_path), PAIR, board)) == PAIR
    assert board.lines == ["start sample", "done sample", "start judge", "done judge"]


def test_where_the_upstream_fails_its_follower_ends_and_the_cause_is_raised(
    tmp_path: Path, work: dict[str, Work]
) -> None:
    def sample(handover: Handover | None) -> None:
        assert handover is not None
        handover.begin(Table(f"{tmp_path}/t", Vector), Vector, [], "item_id", 8)
        handover.has_begun.set()
        raise TableError("no space")

    def judge(handover: Handover | None) -> None:
        assert handover is not None
        while not handover.has_failed:
            time.sleep(0.01)
        raise TableError("not completed")

    board = Board()
    work |= {"sample": sample, "judge": judge}
    with pytest.raises(TableError, match="no space"):
        list(overlap.run_steps(run(tmp_path / "run", *API), PAIR, board))
    assert board.lines[-1] == "failed judge"


def test_where_the_upstream_fails_before_its_first_row_the_follower_does_not_begin(
    tmp_path: Path, work: dict[str, Work]
) -> None:
    def sample(handover: Handover | None) -> None:
        raise TableError("no model")

    board = Board()
    work |= {"sample": sample}
    with pytest.raises(TableError, match="no model"):
        list(overlap.run_steps(run(tmp_path, *API), PAIR, board))
    assert board.lines == ["start sample", "failed sample"]


def test_where_a_follower_fails_its_upstream_goes_on_to_its_end(tmp_path: Path, work: dict[str, Work]) -> None:
    judged = threading.Event()

    def sample(handover: Handover | None) -> None:
        assert handover is not None
        handover.has_begun.set()
        assert judged.wait(timeout=30)

    def judge(handover: Handover | None) -> None:
        judged.set()
        raise TableError("the budget is spent")

    board = Board()
    work |= {"sample": sample, "judge": judge}
    with pytest.raises(TableError, match="the budget is spent"):
        list(overlap.run_steps(run(tmp_path, *API), PAIR, board))
    assert sorted(board.lines) == ["done sample", "failed judge", "start judge", "start sample"]
