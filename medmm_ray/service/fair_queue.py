"""Which tokens a replica's next forward pass holds: requests share passes, each has its turn.

Enters: requests, each of which gives its next piece of work for the room that a pass has left. Leaves: passes, as lists
of pieces. This is fair queueing over requests (Demers, Keshav and Shenker 1989): next is the one that would be
through first if all that wait had equal shares of every pass, by the tokens that each would have had by now (the
virtual time). So one of a single short solution waits for its own size, not for that of 64 long ones, and those of one
size are read in the order in which they came, which makes none later and most earlier than equal shares would. A
request that is small beside one that waits has a head start, so that it is through with the passes that its own tokens
take; what head starts take together is a bounded share of all passes. Pure: no clock, no thread.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

FULL = 0.8  # of a pass's budget: a pass that has as much is full enough for nothing more to be looked for
OVERSHOOT = 1.25  # of the budget: where a solution that begins within it must end
SMALL = 0.25  # of the tokens of the largest request that waits: what has no more is small beside it
HEAD_START = 2048
"""Tokens by which a small request begins ahead of its turn, and of small requests that may do so at once."""
HEAD_START_SHARE = 0.5
"""Of the tokens that are read, what small requests may take ahead of their turn: the rest goes by turns, however many
small ones come."""


class Piece(Protocol):
    """A part of a request that one pass reads."""

    @property
    def num_tokens(self) -> int:
        """Its tokens in the pass."""


P = TypeVar("P", bound=Piece, covariant=True)


class Work(Protocol[P]):
    """A request as the queue sees it (`reward_model.passes.PieceCutter` gives its pieces)."""

    @property
    def tokens_left(self) -> int:
        """Tokens that no piece has had yet."""

    @property
    def is_cut(self) -> bool:
        """Whether every piece was given out."""

    @property
    def context_key(self) -> str:
        """What requests about the same case have in common."""

    @property
    def has_open_prefix(self) -> bool:
        """Whether its next pass reads a prefix that others with the same context would read too."""

    def take(self, room: int, soft_room: int, is_first: bool) -> P | None:
        """The next piece: it begins within `room` tokens and ends within `soft_room`; anything where `is_first`."""


W = TypeVar("W", bound=Work[Piece])


@dataclass
class _Waiting(Generic[W]):
    """A request that waits: the virtual time at which equal shares would have it through, its place of arrival, and
    whether it started ahead of its turn."""

    work: W
    finish: float
    number: int
    has_head_start: bool = False

    @property
    def turn(self) -> tuple[float, int]:
        """The least is next; of equals the one that came first."""
        return self.finish, self.number


class FairQueue(Generic[W]):
    """Requests that have pieces to give."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting[W]] = {}  # by the work's id()
        self._reader_of: dict[str, W] = {}
        """For each context the request that reads its prefix: others of it wait until it is known."""
        self._num_arrived = 0
        self._virtual_time = 0.0
        self._head_starts_left = float(HEAD_START)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: W) -> None:
        """Take a request in; one with nothing to read is refused (`ValueError`)."""
        if work.is_cut:
            raise ValueError("a request without a piece was queued; answer it at once")
        start = self._virtual_time
        num_tokens = work.tokens_left
        has_head_start = self._is_small(num_tokens) and num_tokens <= self._head_starts_left
        if has_head_start:
            self._head_starts_left -= num_tokens
            # As far as any: of several small ones the smallest is first.
            start -= HEAD_START
        self._waiting[id(work)] = _Waiting(work, start + num_tokens, self._num_arrived, has_head_start)
        self._num_arrived += 1

    def _is_small(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` is small beside the largest that waits."""
        largest = max((waiting.work.tokens_left for waiting in self._waiting.values()), default=0)
        return num_tokens <= SMALL * largest

    def remove(self, work: W) -> None:
        """Forget a request; nothing where it is not here any more."""
        self._waiting.pop(id(work), None)
        if self._reader_of.get(work.context_key) is work:
            del self._reader_of[work.context_key]

    @property
    def num_tokens(self) -> int:
        """Tokens that wait."""
        return sum(waiting.work.tokens_left for waiting in self._waiting.values())

    def tokens_before(self, num_tokens: int) -> int:
        """Tokens that are read before a new request of `num_tokens` is through, its own left out: of each that waits at
        most as many as its own."""
        return sum(min(waiting.work.tokens_left, num_tokens) for waiting in self._waiting.values())

    def next_pass(self, budget: int) -> list[tuple[W, Piece]]:
        """What the next pass of about `budget` tokens reads, one piece a request; empty where nothing waits.

        Called when the pass before is through. At most `OVERSHOOT` times the budget, but for a solution that is longer.
        """
        self._release_readers()
        pieces: list[tuple[W, Piece]] = []
        used = used_in_turn = 0
        num_sharing = sum(not waiting.has_head_start for waiting in self._waiting.values())
        # Some dozens of them: a heap would be slower to keep than this is.
        for waiting in sorted(self._waiting.values(), key=lambda waiting: waiting.turn):
            if used >= FULL * budget:
                break
            # It would read the same prefix in the same pass.
            if self._waits_for_reader(waiting.work):
                continue
            work = waiting.work
            piece = work.take(budget - used, int(OVERSHOOT * budget) - used, is_first=used == 0)
            if piece is None:
                continue
            pieces.append((work, piece))
            used += piece.num_tokens
            if not waiting.has_head_start:
                used_in_turn += piece.num_tokens
            if work.is_cut:
                del self._waiting[id(work)]
        # What each of them had in the mean: one that comes now has missed nothing. What head starts took is no turn's:
        # counted here, it would put those that come without one behind all that wait.
        self._virtual_time += used_in_turn / max(1, num_sharing)
        self._head_starts_left = min(HEAD_START, self._head_starts_left + HEAD_START_SHARE * used)
        return pieces

    def _waits_for_reader(self, work: W) -> bool:
        """Whether another request reads the prefix that this one needs; where none does, this one is its reader."""
        if not work.has_open_prefix:
            return False
        return self._reader_of.setdefault(work.context_key, work) is not work

    def _release_readers(self) -> None:
        for key, work in list(self._reader_of.items()):
            if id(work) not in self._waiting or not work.has_open_prefix:
                del self._reader_of[key]
