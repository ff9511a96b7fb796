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
from medmm_ray.pages.review_page.readers import Role
from medmm_ray.pages.review_page.verdicts import (
    DIFFICULTIES,
    FAULTS,
    QUESTION_VERDICTS,
    STEP_VERDICTS,
    UNSURE,
    WITHDRAWN,
    Verdict,
    VerdictLog,
    standing,
)

Status = Literal["open", "disputed", "decided"]
LONGEST_READING_S = 600.0  # longer means that the reader was away
READINGS_FOR_A_PACE = 50


class RefusedError(ValueError):
    """Something that a reader asked for and cannot have; the message is for the reader."""


@dataclass(frozen=True)
class Item:
    """One thing to read. `group` is its question, `seen` the hash of what is shown of it."""

    item_id: str
    group: str
    seen: str


@dataclass(frozen=True)
class Answer:
    """What a reader says of an item; fields as in `Verdict`."""

    verdict: str
    faults: Sequence[str] = ()
    answer_right: bool | None = None
    difficulty: str | None = None
    feedback: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a reader, and everyone, is. `minutes_left` is for `left` at the reader's own pace, once there is one."""

    done: int
    left: int
    minutes_left: float | None
    decided: int
    disputed: int
    total: int


def conclusion(verdict: Verdict) -> tuple[object, ...]:
    """What two readers must have in common to agree; how difficult a question is may be seen differently."""
    return (verdict.verdict, verdict.answer_right)


def status(readings: Sequence[Verdict], adjudication: Verdict | None, needed: int) -> Status:
    """How an item stands: an unsure reader asks for a second one, and counts for nothing beside a sure one."""
    if adjudication:
        return "decided"
    sure = [conclusion(verdict) for verdict in readings if verdict.verdict != UNSURE]
    if len(readings) < (needed if len(sure) == len(readings) else 2):
        return "open"
    return "decided" if len(set(sure)) == 1 else "disputed"


class Desk:
    """The review; every method may be called from any thread."""

    def __init__(
        self,
        items: Iterable[Item],
        log: VerdictLog,
        roles: Mapping[str, Role],
        config: ReviewPageConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.items = {item.item_id: item for item in items}
        self.log, self.roles, self.config, self.clock = log, roles, config, clock
        self.groups: dict[str, list[Item]] = {}
        for item in self.items.values():
            self.groups.setdefault(item.group, []).append(item)
        self.needed = {group: 1 + self._is_read_twice(group) for group in self.groups}
        verdicts = log.read()
        self._standing = standing(v for v in verdicts if self._is_of_this_text(v))
        self._numbers = {name: max((v.number for v in verdicts if v.reader == name), default=0) for name in roles}
        self._leases: dict[str, tuple[str, float]] = {}  # by reader: group, and since when the reader is silent
        self._shown: dict[str, tuple[str, float]] = {}  # by reader: item, and since when it is in view
        self._lock = threading.RLock()

    def _is_read_twice(self, group: str) -> bool:
        return int(digest("second reader", self.config.seed, group), 16) / 16**16 < self.config.second_reader_share

    def _is_of_this_text(self, verdict: Verdict) -> bool:
        item = self.items.get(verdict.item_id)
        return item is not None and verdict.seen == item.seen

    # What a reader may do

    def current(self, reader: str) -> Item | None:
        """The item that the reader should read now, kept from others; None where nothing is left."""
        with self._lock:
            for group in self._in_turn(reader):
                item = next((i for i in self.groups[group] if self._wants(reader, i)), None)
                if item and self._is_free(reader, group):
                    self._leases[reader] = (group, self.clock())
                    return self._show(reader, item)
            return None

    def move(self, reader: str, item_id: str, by: int) -> Item | None:
        """The item before (-1) or after (1) `item_id` among those that the reader has read and the current one."""
        with self._lock:
            current = self.current(reader)
            trail = self._trail(reader)
            trail += [current.item_id] if current and current.item_id not in trail else []
            if item_id not in trail:
                return current
            return self._show(reader, self.items[trail[min(max(trail.index(item_id) + by, 0), len(trail) - 1)]])

    def submit(self, reader: str, item_id: str, answer: Answer) -> None:
        """Keep a reader's verdict: when this returns, it is in the log. Raises `RefusedError`."""
        with self._lock:
            item = self.items.get(item_id)
            if item is None:
                raise RefusedError("This item is not in the review any more.")
            self._check(answer)
            self._check_open(reader, item)
            if reader not in self._standing.get(item_id, {}) and not (
                self._wants(reader, item) and self._is_free(reader, item.group)
            ):
                raise RefusedError("You were away and this question went to another reader. Here is your next one.")
            self._append(reader, item, answer)
            held, _ = self._leases.get(reader, ("", 0.0))
            if held == item.group and not any(self._wants(reader, other) for other in self.groups[held]):
                del self._leases[reader]

    def undo(self, reader: str) -> Item | None:
        """Take the reader's last verdict back and show its item again; None where there is none."""
        with self._lock:
            trail = self._trail(reader)
            if not trail:
                return None
            item = self.items[trail[-1]]
            self._check_open(reader, item)
            self._append(reader, item, Answer(WITHDRAWN))
            if self._is_free(reader, item.group):
                self._leases[reader] = (item.group, self.clock())
            return self._show(reader, item)

    # What is known

    def own(self, reader: str, item_id: str) -> Verdict | None:
        """The reader's own verdict on an item."""
        return self._standing.get(item_id, {}).get(reader)

    def readings(self, item_id: str) -> list[Verdict]:
        """The readers' verdicts on an item: for adjudicators only."""
        return [v for _, v in sorted(self._standing.get(item_id, {}).items()) if not v.adjudicates]

    def status(self, item: Item) -> Status:
        adjudication = next((v for v in self._standing.get(item.item_id, {}).values() if v.adjudicates), None)
        return status(self.readings(item.item_id), adjudication, self.needed[item.group])

    def progress(self, reader: str) -> Progress:
        """How far the reader and the whole review are."""
        with self._lock:
            states = [self.status(item) for item in self.items.values()]
            left = sum(self._wants(reader, item) for item in self.items.values())
            trail = self._trail(reader)
            seconds = [self._standing[i][reader].seconds for i in trail[-READINGS_FOR_A_PACE:]]
            pace = median(seconds) if seconds else None
            return Progress(
                done=len(trail),
                left=left,
                minutes_left=None if pace is None else pace * left / 60,
                decided=states.count("decided"),
                disputed=states.count("disputed"),
                total=len(states),
            )

    # Inside

    def _wants(self, reader: str, item: Item) -> bool:
        if self.own(reader, item.item_id):
            return False
        return self.status(item) == ("disputed" if self._adjudicates(reader) else "open")

    def _adjudicates(self, reader: str) -> bool:
        return self.roles[reader] == "adjudicator"

    def _is_free(self, reader: str, group: str) -> bool:
        """Whether no other reader has the group in hand."""
        return not any(
            other != reader and held == group and self.clock() - since < self.config.lease_minutes * 60
            for other, (held, since) in self._leases.items()
        )

    def _in_turn(self, reader: str) -> Iterator[str]:
        """The groups in the order in which the reader takes them: the one in hand, begun ones, then all."""
        held = [self._leases[reader][0]] if reader in self._leases else []
        begun = [self.items[item_id].group for item_id in reversed(self._trail(reader))]
        yield from dict.fromkeys([*held, *begun, *self.groups])

    def _trail(self, reader: str) -> list[str]:
        """The items that the reader has read, in that order."""
        own = [of_item[reader] for of_item in self._standing.values() if reader in of_item]
        return [verdict.item_id for verdict in sorted(own, key=lambda v: v.number)]

    def _show(self, reader: str, item: Item) -> Item:
        if self._shown.get(reader, ("", 0.0))[0] != item.item_id:
            self._shown[reader] = (item.item_id, self.clock())
        return item

    def _check_open(self, reader: str, item: Item) -> None:
        decided_above = any(v.adjudicates and v.reader != reader for v in self._standing.get(item.item_id, {}).values())
        if decided_above:
            raise RefusedError("An adjudicator has decided this item; it can no longer be changed.")

    def _check(self, answer: Answer) -> None:
        allowed = STEP_VERDICTS if self.config.what == "steps" else QUESTION_VERDICTS
        if answer.verdict not in allowed:
            raise RefusedError(f"The verdict {answer.verdict!r} is unknown here; it must be one of {allowed}.")
        if set(answer.faults) - set(FAULTS) or (answer.faults and answer.verdict != "wrong"):
            raise RefusedError(f"Only a wrong step has faults, of {FAULTS}; these are {list(answer.faults)}.")
        if answer.difficulty not in (None, *DIFFICULTIES):
            raise RefusedError(f"The difficulty {answer.difficulty!r} is unknown; it must be one of {DIFFICULTIES}.")

    def _append(self, reader: str, item: Item, answer: Answer) -> None:
        shown, since = self._shown.get(reader, ("", 0.0))
        seconds = min(self.clock() - since, LONGEST_READING_S) if shown == item.item_id else 0.0
        verdict = Verdict(
            reader=reader,
            number=self._numbers[reader] + 1,
            item_id=item.item_id,
            seen=item.seen,
            verdict=answer.verdict,
            adjudicates=self._adjudicates(reader),
            faults=sorted(answer.faults, key=FAULTS.index),
            answer_right=answer.answer_right,
            difficulty=answer.difficulty,
            feedback=answer.feedback.strip(),
            seconds=round(seconds, 1),
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock())),
        )
        self.log.append(verdict)
        self._numbers[reader] = verdict.number
        self._shown.pop(reader, None)
        of_item = self._standing.setdefault(item.item_id, {})
        of_item.pop(reader, None)
        if verdict.verdict != WITHDRAWN:
            of_item[reader] = verdict
