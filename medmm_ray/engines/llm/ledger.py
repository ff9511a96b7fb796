"""What a run has spent on a model behind an API: one small file, written whole, beside the model's stored answers.

The worst case of each call is in the file before the call may be sent, so that a run that was killed has booked every
call that it may have to pay. When the file is opened again, an open reservation whose answer is stored is booked at
that answer's cost, the others as possibly paid: of each client no more than it could have in flight.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated

from pyarrow import fs as pafs
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.engines.llm.limits import Limits
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer

LEDGER_FILE = "ledger.json"
Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AnswersByRequest = Mapping[tuple[str, str], PricedAnswer]
"""Answers by the group and key of their requests."""


@dataclass(frozen=True)
class PlannedCall:
    """One attempt at a request, named by group and key; the most tokens and US dollars that it can take."""

    group: str
    key: str
    tokens: int
    dollars: float


@dataclass(frozen=True)
class Reservation:
    """A call that a client may send; `in_flight` is the most that this client sends at a time."""

    client_id: str
    in_flight: int
    call: PlannedCall


@dataclass
class Ledger:
    """US dollars and calls so far; `epoch` counts the budgets that kept this ledger, one after the other."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    epoch: int = 0
    spent: Dollars = 0.0
    answers: int = 0
    possibly_paid: Dollars = 0.0
    lost_calls: int = 0

    def book_answer(self, dollars: float) -> None:
        """Book an answer that is stored, at its cost."""
        self.spent += dollars
        self.answers += 1

    def book_lost(self, dollars: float) -> None:
        """Book a call without a whole answer that may be billed all the same, at its worst case."""
        self.possibly_paid += dollars
        self.lost_calls += 1

    def book_dead(self, reservations: Sequence[Reservation], stored_answers: AnswersByRequest) -> None:
        """Book the reservations of one client that died; the costliest calls without an answer count as sent."""
        lost = []
        for reservation in reservations:
            call = reservation.call
            answer = stored_answers.get((call.group, call.key))
            if answer is None:
                lost.append(reservation)
            else:
                self.book_answer(answer.cost)
        lost.sort(key=lambda reservation: -reservation.call.dollars)
        num_in_flight = lost[0].in_flight if lost else 0
        for reservation in lost[:num_in_flight]:
            self.book_lost(reservation.call.dollars)


@dataclass
class _StoredLedger(Ledger):
    """The ledger's file: beside the ledger client, calls in flight, group, key and dollars of each reservation.

    Ids of the reservations, and limits, are for a budget whose process died and that Ray starts again.
    """

    reserved: list[tuple[str, int, str, str, Dollars]] = field(default_factory=list)
    reservation_ids: list[int] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class LedgerState:
    """What the file holds: the ledger, its open reservations by id, and the limits that were set last."""

    ledger: Ledger
    reservations: dict[int, Reservation]
    limits: Limits


_STORED_LEDGER = TypeAdapter(_StoredLedger)


class LedgerFile:
    """The file of a ledger under `folder`, a path or URI."""

    def __init__(self, folder: str) -> None:
        self._fs, path = filesystem(folder)
        self._folder = path.rstrip("/")
        self.path = f"{self._folder}/{LEDGER_FILE}"

    def read(self) -> LedgerState:
        """What the file holds; an empty ledger where there is none.

        Raises `TableError` where the file is damaged.
        """
        stored = self._read()
        figures = {ledger_field.name: getattr(stored, ledger_field.name) for ledger_field in fields(Ledger)}
        # Files of earlier versions have no ids.
        ids = stored.reservation_ids or range(len(stored.reserved))
        reservations = {}
        for reservation_id, (client_id, in_flight, group, key, dollars) in zip(ids, stored.reserved, strict=True):
            # A bucket refills while nobody runs: the tokens of a reservation are of no use to the next process.
            call = PlannedCall(group, key, tokens=0, dollars=dollars)
            reservations[reservation_id] = Reservation(client_id, in_flight, call)
        return LedgerState(Ledger(**figures), reservations, stored.limits)

    def create_folder(self) -> None:
        """Make the folder of the file where there is none."""
        self._fs.create_dir(self._folder, recursive=True)

    def write(self, content: bytes, epoch: int) -> bool:
        """Replace the file; False, and nothing is written, where a budget of a later epoch has taken it over."""
        if self._read().epoch > epoch:
            return False
        write_file(self._fs, self.path, content)
        return True

    def _read(self) -> _StoredLedger:
        if self._fs.get_file_info(self.path).type == pafs.FileType.NotFound:
            return _StoredLedger()
        with self._fs.open_input_stream(self.path, compression=None) as stream:
            content = stream.read()
        try:
            return _STORED_LEDGER.validate_json(content)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
        field_path = ".".join(str(part) for part in fault["loc"])
        what = f"{field_path}: {fault['msg']}" if field_path else fault["msg"]
        if fault["type"] == "json_invalid":
            what = f"{len(content)} bytes that are no JSON"
        raise TableError(
            f"{self.path} is damaged ({what}). Restore it from a copy, or delete it: the answers stay, but "
            "what was spent so far no longer counts against max_cost_usd"
        )


def ledger_bytes(state: LedgerState) -> bytes:
    """The content of a ledger's file."""
    rows = []
    for reservation in state.reservations.values():
        call = reservation.call
        rows.append([reservation.client_id, reservation.in_flight, call.group, call.key, call.dollars])
    content = {
        **asdict(state.ledger),
        "reserved": rows,
        "reservation_ids": list(state.reservations),
        "limits": asdict(state.limits),
    }
    return json.dumps(content).encode()


def stored_answers_of(reservations: Sequence[Reservation], store: AnswerStore) -> AnswersByRequest:
    """The stored answers of the calls that are reserved."""
    return store.look_up((reservation.call.group, reservation.call.key) for reservation in reservations)
