"""Who reads what next, and what is decided: the state of a review, without a page.

Enters: the items in their order, the verdicts so far, the readers. Leaves: the item that a reader should see, new
verdicts in the log, progress. One reader at a time reads the items of a question; some questions, and every item that
its reader was unsure of, go to a second one; where two contradict each other, an adjudicator decides, who reads nothing
else. A reader never learns what others said.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from medmm_ray.config import digest
from medmm_ray.pages.review_page import ReviewPageConfig
from medmm_ray.pages.review_page.accounts import Role
from medmm_ray.pages.review_page.verdicts import (
    DIFFICULTIES,
    FAULTS,
    QUESTION_VERDICTS,
    STEP_VERDICTS,
    UNSURE,
    WITHDRAWN,
    Verdict,
    VerdictLog,
    latest_verdicts,
)

Status = Literal["open", "disputed", "decided"]
LONGEST_READING_S = 600.0  # longer means that the reader was away
READINGS_FOR_A_PACE = 50


class RefusedError(ValueError):
    """Something that a reader asked for and cannot have; the message is for the reader."""


@dataclass(frozen=True)
class QueueItem:
    """One thing to read: a step of a question's solution, or the question itself.

    `content_hash` is of what a reader sees of it: a verdict counts for this content alone.
    """

    item_id: str
    question_id: str
    content_hash: str


@dataclass(frozen=True)
class Submission:
    """What a reader says of an item; fields as in `Verdict`."""

    verdict: str
    faults: Sequence[str] = ()
    answer_right: bool | None = None
    difficulty: str | None = None
    feedback: str = ""


@dataclass(frozen=True)
class ReaderProgress:
    """How far a reader, and everyone, is. `minutes_left` is for `left` at the reader's own pace, once there is one."""

    done: int
    left: int
    minutes_left: float | None
    decided: int
    disputed: int
    total: int


@dataclass(frozen=True)
class _Lease:
    """A question in a reader's hand; `since` is when the reader was last heard of, seconds."""

    question_id: str
    since: float


@dataclass(frozen=True)
class _Viewing:
    """The item on a reader's screen, and since when, seconds."""

    item_id: str
    since: float


def conclusion(verdict: Verdict) -> tuple[object, ...]:
    """What two readers must have in common to agree; how difficult a question is may be seen differently."""
    return (verdict.verdict, verdict.answer_right)


def status(readings: Sequence[Verdict], adjudication: Verdict | None, needed: int) -> Status:
    """State of an item with these readings, where `needed` readers should read it.

    An unsure reader asks for a second one, and counts for nothing beside a sure one.
    """
    if adjudication:
        return "decided"
    conclusions = [conclusion(verdict) for verdict in readings if verdict.verdict != UNSURE]
    if len(conclusions) < len(readings):
        # Somebody was unsure: a second reader is asked, whatever the question's share.
        needed = 2
    if len(readings) < needed:
        return "open"
    return "decided" if len(set(conclusions)) == 1 else "disputed"


class Assigner:
    """The review's state: which reader reads which item. Every method may be called from any thread."""

    def __init__(
        self,
        items: Iterable[QueueItem],
        log: VerdictLog,
        roles: Mapping[str, Role],
        config: ReviewPageConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.items = {item.item_id: item for item in items}
        self.log = log
        self.roles = roles
        self.config = config
        self.clock = clock
        self.items_by_question: dict[str, list[QueueItem]] = {}
        for item in self.items.values():
            self.items_by_question.setdefault(item.question_id, []).append(item)
        self.readers_needed: dict[str, int] = {}
        for question_id in self.items_by_question:
            self.readers_needed[question_id] = 2 if self._is_read_twice(question_id) else 1
        verdicts = log.read()
        # By item and reader. Verdicts on a content that has changed since do not count.
        self._verdicts = latest_verdicts(verdict for verdict in verdicts if self._is_current(verdict))
        self._last_numbers = dict.fromkeys(roles, 0)
        for verdict in verdicts:
            if verdict.reader in roles:
                last_number = self._last_numbers[verdict.reader]
                self._last_numbers[verdict.reader] = max(last_number, verdict.number)
        self._leases: dict[str, _Lease] = {}  # by reader
        self._viewings: dict[str, _Viewing] = {}  # by reader
        self._lock = threading.RLock()  # reentrant: public methods call each other

    def _is_read_twice(self, question_id: str) -> bool:
        # The choice hangs on the question alone: it stays the same when the queue grows or is put in another order.
        uniform = int(digest("second reader", self.config.seed, question_id), 16) / 16**16
        return uniform < self.config.second_reader_share

    def _is_current(self, verdict: Verdict) -> bool:
        item = self.items.get(verdict.item_id)
        return item is not None and verdict.seen == item.content_hash

    # What a reader may do

    def current(self, reader: str) -> QueueItem | None:
        """The item that the reader should read now, kept from others; None where nothing is left."""
        with self._lock:
            for question_id in self._questions_in_turn(reader):
                item = self._next_item(reader, question_id)
                if item and self._is_free(reader, question_id):
                    self._leases[reader] = _Lease(question_id, self.clock())
                    return self._view(reader, item)
            return None

    def move(self, reader: str, item_id: str, by: int) -> QueueItem | None:
        """The item before (-1) or after (1) `item_id` among those that the reader has read and the current one."""
        with self._lock:
            current = self.current(reader)
            item_ids = self._items_read(reader)
            if current and current.item_id not in item_ids:
                item_ids.append(current.item_id)
            if item_id not in item_ids:
                return current
            place = item_ids.index(item_id) + by
            place = min(max(place, 0), len(item_ids) - 1)
            return self._view(reader, self.items[item_ids[place]])

    def submit(self, reader: str, item_id: str, submission: Submission) -> None:
        """Keep a reader's verdict: when this returns, it is in the log. Raises `RefusedError`."""
        with self._lock:
            item = self.items.get(item_id)
            if item is None:
                raise RefusedError("This item is not in the review any more.")
            self._check(submission)
            self._check_open(reader, item)
            # A reader may change an own verdict at any time, also of a question that is in another's hand now.
            is_correction = self.verdict_of(reader, item_id) is not None
            if not is_correction and not (self._may_read(reader, item) and self._is_free(reader, item.question_id)):
                raise RefusedError("You were away and this question went to another reader. Here is your next one.")
            self._append(reader, item, submission)
            self._release_finished(reader, item.question_id)

    def undo(self, reader: str) -> QueueItem | None:
        """Take the reader's last verdict back and show its item again; None where there is none."""
        with self._lock:
            item_ids = self._items_read(reader)
            if not item_ids:
                return None
            item = self.items[item_ids[-1]]
            self._check_open(reader, item)
            self._append(reader, item, Submission(WITHDRAWN))
            if self._is_free(reader, item.question_id):
                self._leases[reader] = _Lease(item.question_id, self.clock())
            return self._view(reader, item)

    # What is known

    def verdict_of(self, reader: str, item_id: str) -> Verdict | None:
        """The reader's own verdict on an item."""
        return self._verdicts.get(item_id, {}).get(reader)

    def readings(self, item_id: str) -> list[Verdict]:
        """The readers' verdicts on an item, by name: for adjudicators only."""
        verdicts = self._verdicts.get(item_id, {})
        return [verdict for _, verdict in sorted(verdicts.items()) if not verdict.adjudicates]

    def status(self, item: QueueItem) -> Status:
        """Whether the item is open, disputed or decided."""
        verdicts = self._verdicts.get(item.item_id, {}).values()
        adjudication = next((verdict for verdict in verdicts if verdict.adjudicates), None)
        return status(
            self.readings(item.item_id),
            adjudication,
            self.readers_needed[item.question_id],
        )

    def progress(self, reader: str) -> ReaderProgress:
        """How far the reader and the whole review are."""
        with self._lock:
            states = list(map(self.status, self.items.values()))
            num_left = sum(self._may_read(reader, item) for item in self.items.values())
            item_ids = self._items_read(reader)
            # The median of the last readings: breaks do not count, and who gets faster sees it.
            seconds = [self._verdicts[item_id][reader].seconds for item_id in item_ids[-READINGS_FOR_A_PACE:]]
            return ReaderProgress(
                done=len(item_ids),
                left=num_left,
                minutes_left=median(seconds) * num_left / 60 if seconds else None,
                decided=states.count("decided"),
                disputed=states.count("disputed"),
                total=len(states),
            )

    # Inside

    def _may_read(self, reader: str, item: QueueItem) -> bool:
        """Whether the item waits for such a reader, and for this one still."""
        if self.verdict_of(reader, item.item_id):
            return False
        return self.status(item) == ("disputed" if self._adjudicates(reader) else "open")

    def _next_item(self, reader: str, question_id: str) -> QueueItem | None:
        for item in self.items_by_question[question_id]:
            if self._may_read(reader, item):
                return item
        return None

    def _adjudicates(self, reader: str) -> bool:
        return self.roles[reader] == "adjudicator"

    def _is_free(self, reader: str, question_id: str) -> bool:
        """Whether no other reader has the question in hand."""
        lease_s = self.config.lease_minutes * 60
        for name, lease in self._leases.items():
            has_run_out = self.clock() - lease.since >= lease_s
            if name != reader and lease.question_id == question_id and not has_run_out:
                return False
        return True

    def _release_finished(self, reader: str, question_id: str) -> None:
        """Give the question in the reader's hand back where nothing of it is left for the reader."""
        lease = self._leases.get(reader)
        if lease is None or lease.question_id != question_id:
            return
        if self._next_item(reader, question_id) is None:
            del self._leases[reader]

    def _questions_in_turn(self, reader: str) -> Iterator[str]:
        """The questions in the order in which the reader takes them: the one in hand, begun ones, then all."""
        lease = self._leases.get(reader)
        leased = [lease.question_id] if lease else []
        begun = [self.items[item_id].question_id for item_id in reversed(self._items_read(reader))]
        yield from dict.fromkeys([*leased, *begun, *self.items_by_question])

    def _items_read(self, reader: str) -> list[str]:
        """Ids of the items that the reader has read, in that order."""
        verdicts = []
        for by_reader in self._verdicts.values():
            if reader in by_reader:
                verdicts.append(by_reader[reader])
        verdicts.sort(key=lambda verdict: verdict.number)
        return [verdict.item_id for verdict in verdicts]

    def _view(self, reader: str, item: QueueItem) -> QueueItem:
        """The item, noted as the one on the reader's screen; a second look does not start its clock anew."""
        viewing = self._viewings.get(reader)
        if viewing is None or viewing.item_id != item.item_id:
            self._viewings[reader] = _Viewing(item.item_id, self.clock())
        return item

    def _check_open(self, reader: str, item: QueueItem) -> None:
        for verdict in self._verdicts.get(item.item_id, {}).values():
            if verdict.adjudicates and verdict.reader != reader:
                raise RefusedError("An adjudicator has decided this item; it can no longer be changed.")

    def _check(self, submission: Submission) -> None:
        allowed = STEP_VERDICTS if self.config.what == "steps" else QUESTION_VERDICTS
        if submission.verdict not in allowed:
            raise RefusedError(f"The verdict {submission.verdict!r} is unknown here; it must be one of {allowed}.")
        faults = list(submission.faults)
        if set(faults) - set(FAULTS) or (faults and submission.verdict != "wrong"):
            raise RefusedError(f"Only a wrong step has faults, of {FAULTS}; these are {faults}.")
        difficulty = submission.difficulty
        if difficulty not in (None, *DIFFICULTIES):
            raise RefusedError(f"The difficulty {difficulty!r} is unknown; it must be one of {DIFFICULTIES}.")

    def _append(self, reader: str, item: QueueItem, submission: Submission) -> None:
        """Write the verdict to the log, then take it into the state: what is counted is always on the disk."""
        verdict = Verdict(
            reader=reader,
            number=self._last_numbers[reader] + 1,
            item_id=item.item_id,
            seen=item.content_hash,
            verdict=submission.verdict,
            adjudicates=self._adjudicates(reader),
            faults=sorted(submission.faults, key=FAULTS.index),
            answer_right=submission.answer_right,
            difficulty=submission.difficulty,
            feedback=submission.feedback.strip(),
            seconds=round(self._seconds_viewed(reader, item), 1),
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock())),
        )
        self.log.append(verdict)
        self._last_numbers[reader] = verdict.number
        self._viewings.pop(reader, None)
        by_reader = self._verdicts.setdefault(item.item_id, {})
        by_reader.pop(reader, None)
        if verdict.verdict != WITHDRAWN:
            by_reader[reader] = verdict

    def _seconds_viewed(self, reader: str, item: QueueItem) -> float:
        viewing = self._viewings.get(reader)
        if viewing is None or viewing.item_id != item.item_id:
            return 0.0
        return min(self.clock() - viewing.since, LONGEST_READING_S)
