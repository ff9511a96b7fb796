"""Who reads what next: assignment, second readers, adjudication, progress, resuming."""

from pathlib import Path
from typing import Any

import pytest

from medmm_ray.pages.review_page import ReviewPageConfig
from medmm_ray.pages.review_page.accounts import Role
from medmm_ray.pages.review_page.assigner import Assigner, QueueItem, RefusedError, Submission, status
from medmm_ray.pages.review_page.verdicts import Verdict, VerdictLog

ITEMS = [QueueItem(f"s{group}/{step}", f"q{group}", f"seen{group}{step}") for group in range(3) for step in range(2)]
ROLES: dict[str, Role] = {"anna": "reader", "ben": "reader", "cora": "adjudicator"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def assigner_of(folder: Path, items: list[QueueItem] = ITEMS, **settings: Any) -> Assigner:
    config = ReviewPageConfig(**{"second_reader_share": 0.0, **settings})
    return Assigner(items, VerdictLog(str(folder)), ROLES, config, CLOCK)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    VerdictLog(str(tmp_path)).claim()
    return tmp_path


def now(review: Assigner, reader: str) -> str | None:
    item = review.current(reader)
    return item.item_id if item else None


def read(review: Assigner, reader: str, *said: str) -> list[str]:
    """Let a reader say these of what comes; gives the items."""
    items = []
    for word in said:
        item = review.current(reader)
        assert item
        review.submit(reader, item.item_id, Submission(word))
        items.append(item.item_id)
    return items


def test_a_question_has_one_reader_at_a_time(log: Path) -> None:
    review = assigner_of(log)
    assert (now(review, "anna"), now(review, "ben"), now(review, "anna")) == ("s0/0", "s1/0", "s0/0")
    assert read(review, "anna", "right", "wrong", "right", "right") == ["s0/0", "s0/1", "s2/0", "s2/1"]
    assert now(review, "anna") is None
    assert read(review, "ben", "right", "neutral") == ["s1/0", "s1/1"]
    assert (now(review, "anna"), now(review, "ben"), now(review, "cora")) == (None, None, None)
    assert review.progress("anna").decided == 6


def test_what_a_silent_reader_holds_goes_to_others(log: Path) -> None:
    review = assigner_of(log, lease_minutes=10.0)
    assert read(review, "anna", "right") == ["s0/0"]
    CLOCK.now += 599
    assert now(review, "ben") == "s1/0"
    CLOCK.now += 2
    review.submit("ben", "s1/0", Submission("right"))
    assert read(review, "ben", "right", "right") == ["s1/1", "s0/1"]
    with pytest.raises(RefusedError, match="went to another reader"):
        review.submit("anna", "s0/1", Submission("right"))
    assert now(review, "anna") == "s2/0"


def test_changing_an_old_verdict_gives_nothing_out_of_hand(log: Path) -> None:
    review = assigner_of(log)
    read(review, "anna", "right", "right")
    assert now(review, "anna") == "s1/0"
    review.submit("anna", "s0/0", Submission("wrong"))
    assert (now(review, "ben"), now(review, "anna")) == ("s2/0", "s1/0")


def test_a_silent_reader_may_go_on_where_nobody_took_over(log: Path) -> None:
    review = assigner_of(log, lease_minutes=10.0)
    assert now(review, "anna") == "s0/0"
    CLOCK.now += 3600
    review.submit("anna", "s0/0", Submission("right"))
    assert now(review, "anna") == "s0/1"


def test_a_reader_resumes_in_a_new_process(log: Path) -> None:
    review = assigner_of(log)
    read(review, "ben", "right", "right")
    assert read(review, "anna", "right") == ["s1/0"]
    again = assigner_of(log)
    assert (now(again, "anna"), now(again, "ben")) == ("s1/1", "s2/0")
    assert again.progress("ben").done == 2
    read(again, "anna", "wrong")
    assert [(v.reader, v.number) for v in VerdictLog(str(log)).read()] == [
        ("anna", 1), ("anna", 2), ("ben", 1), ("ben", 2),
    ]  # fmt: skip


def test_second_readers_are_drawn_by_question_and_blind(log: Path) -> None:
    many = [QueueItem(f"s{n}/0", f"q{n}", "x") for n in range(2000)]

    def read_twice(items: list[QueueItem]) -> list[str]:
        needed = assigner_of(log, items, second_reader_share=0.25).readers_needed
        return [question_id for question_id, number in needed.items() if number == 2]

    drawn = read_twice(many)
    assert 440 < len(drawn) < 560
    assert drawn == read_twice(many[::-1])[::-1]
    review = assigner_of(log, second_reader_share=1.0)
    assert read(review, "anna", *["right"] * 6) == [item.item_id for item in ITEMS]
    assert review.progress("anna").decided == 0
    assert read(review, "ben", *["right"] * 6) == [item.item_id for item in ITEMS]
    assert review.progress("ben").decided == 6


def test_contradictions_go_to_the_adjudicator_alone(log: Path) -> None:
    review = assigner_of(log, second_reader_share=1.0)
    read(review, "anna", "right", "right", "wrong")
    assert now(review, "cora") is None
    read(review, "ben", "right", "wrong")
    assert review.progress("cora").disputed == 1
    assert now(review, "cora") == "s0/1"
    assert [(v.reader, v.verdict) for v in review.readings("s0/1")] == [("anna", "right"), ("ben", "wrong")]
    review.submit(
        "anna", "s0/1", Submission("wrong")
    )  # the first reader changes the verdict: no contradiction any more
    assert now(review, "cora") is None
    review.submit("anna", "s0/1", Submission("neutral"))
    assert read(review, "cora", "right") == ["s0/1"]
    assert review.progress("cora").decided == 2
    for reader in ("anna", "ben"):
        with pytest.raises(RefusedError, match="An adjudicator has decided"):
            review.submit(reader, "s0/1", Submission("right"))
    assert review.undo("cora") == ITEMS[1]
    assert now(review, "cora") == "s0/1"


def test_who_is_unsure_asks_for_a_second_reader(log: Path) -> None:
    review = assigner_of(log, ITEMS[:2])
    read(review, "anna", "unsure", "unsure")
    assert now(review, "anna") is None
    read(review, "ben", "wrong", "unsure")
    assert (review.status(ITEMS[0]), review.status(ITEMS[1])) == ("decided", "disputed")
    assert now(review, "cora") == "s0/1"


@pytest.mark.parametrize(
    ("said", "needed", "expected"),
    [
        ([], 1, "open"),
        (["right"], 1, "decided"),
        (["right"], 2, "open"),
        (["unsure"], 1, "open"),
        (["unsure", "right"], 1, "decided"),
        (["unsure", "unsure"], 2, "disputed"),
        (["right", "right"], 2, "decided"),
        (["right", "neutral"], 2, "disputed"),
        (["right", "wrong"], 1, "disputed"),
    ],
)
def test_status(said: list[str], needed: int, expected: str) -> None:
    readings = [Verdict(reader=str(n), number=1, item_id="i", seen="x", verdict=word) for n, word in enumerate(said)]
    assert status(readings, None, needed) == expected
    above = Verdict(reader="cora", number=1, item_id="i", seen="x", verdict="unsure", adjudicates=True)
    assert status(readings, above, needed) == "decided"


def test_taking_back_and_moving(log: Path) -> None:
    review = assigner_of(log)
    assert review.undo("anna") is None
    read(review, "anna", "right", "wrong", "right")
    assert [i.item_id for i in (review.move("anna", "s1/1", -1), review.move("anna", "s0/0", -1)) if i] == [
        "s1/0", "s0/0",
    ]  # fmt: skip
    forward = [review.move("anna", item, 1) for item in ("s0/0", "s1/0", "s1/1", "unknown")]
    assert [i.item_id for i in forward if i] == ["s0/1", "s1/1", "s1/1", "s1/1"]
    assert review.undo("anna") == ITEMS[2]
    assert (review.verdict_of("anna", "s1/0"), now(review, "anna")) == (None, "s1/0")
    assert review.undo("anna") == ITEMS[1]
    assert now(review, "anna") == "s0/1"
    review.submit("anna", "s0/0", Submission("wrong", faults=["medical", "logical"]))
    changed = assigner_of(log).verdict_of("anna", "s0/0")
    assert changed
    assert (changed.verdict, changed.faults, changed.number) == ("wrong", ["logical", "medical"], 6)


def test_progress_and_pace(log: Path) -> None:
    review = assigner_of(log)
    assert review.progress("anna").minutes_left is None
    for seconds in (10, 30, 5000):  # the last one was away
        item = review.current("anna")
        assert item
        CLOCK.now += seconds
        review.submit("anna", item.item_id, Submission("right"))
    found = review.progress("anna")
    assert (found.done, found.left, found.decided, found.disputed, found.total) == (3, 3, 3, 0, 6)
    assert found.minutes_left == 30 * 3 / 60
    assert [v.seconds for v in VerdictLog(str(log)).read()] == [10, 30, 600]
    assert (review.progress("cora").done, review.progress("cora").left) == (0, 0)


def test_verdicts_on_another_text_do_not_count(log: Path) -> None:
    read(assigner_of(log), "anna", "right", "right")
    changed = [QueueItem(i.item_id, i.question_id, "other" if i.item_id == "s0/1" else i.content_hash) for i in ITEMS]
    assert now(assigner_of(log, changed), "anna") == "s0/1"


@pytest.mark.parametrize(
    ("what", "answer", "message"),
    [
        ("steps", Submission("keep"), "'keep' is unknown here"),
        ("questions", Submission("right"), "'right' is unknown here"),
        ("steps", Submission("withdrawn"), "is unknown here"),
        ("steps", Submission("right", faults=["logical"]), "Only a wrong step has faults"),
        ("steps", Submission("wrong", faults=["spelling"]), "Only a wrong step has faults"),
        ("questions", Submission("keep", difficulty="odd"), "'odd' is unknown"),
    ],
)
def test_what_cannot_be_said_is_refused_and_not_kept(what: str, answer: Submission, message: str, log: Path) -> None:
    review = assigner_of(log, what=what)
    assert now(review, "anna") == "s0/0"
    with pytest.raises(RefusedError, match=message):
        review.submit("anna", "s0/0", answer)
    with pytest.raises(RefusedError, match="not in the review any more"):
        review.submit("anna", "gone", Submission("right" if what == "steps" else "keep"))
    assert VerdictLog(str(log)).read() == []


def test_many_threads_read_each_item_once(log: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    roles: dict[str, Role] = {f"r{n}": "reader" for n in range(8)}
    items = [QueueItem(f"s{n}/0", f"q{n // 2}", "x") for n in range(80)]
    review = Assigner(items, VerdictLog(str(log)), roles, ReviewPageConfig(second_reader_share=0.0), CLOCK)

    def work(reader: str) -> list[str]:
        done = []
        while item := review.current(reader):
            review.submit(reader, item.item_id, Submission("right"))
            done.append(item.item_id)
        return done

    with ThreadPoolExecutor(8) as pool:
        done = [item for of_reader in pool.map(work, roles) for item in of_reader]
    assert sorted(done) == sorted(item.item_id for item in items)
    assert len(VerdictLog(str(log)).read()) == 80


def test_a_network_address_needs_encryption() -> None:
    with pytest.raises(ValueError, match="passwords and images would cross the network in clear"):
        ReviewPageConfig(host="0.0.0.0")  # noqa: S104
    assert ReviewPageConfig(host="0.0.0.0", certificate="c.pem", private_key="k.pem").port == 7870  # noqa: S104
