"""An engine for the service that takes a set time a token and computes nothing, so that figures are those of what lies
around a model. Tests use it too."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from medmm_ray.service.rerank import ModelInput


@dataclass
class NoCache:
    """The figures of an engine that keeps nothing."""

    num_tokens: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class SlowRequest:
    """Solutions by their numbers of tokens; a request named "broken" cannot be read."""

    name: str
    solutions: Sequence[int]


@dataclass(frozen=True)
class SlowPiece:
    """Some solutions."""

    num_tokens: int


@dataclass(eq=False)
class SlowWork:
    """A request of the queue."""

    request: SlowRequest
    open: list[int]
    num_read: int = 0
    case: ModelInput | None = None

    @property
    def tokens_left(self) -> int:
        """Tokens that no piece has had yet."""
        return sum(self.open)

    @property
    def is_cut(self) -> bool:
        """Whether every piece was given out."""
        return not self.open

    @property
    def context_key(self) -> str:
        """Its name: nothing is shared."""
        return self.request.name

    @property
    def has_open_prefix(self) -> bool:
        """Never: there are no prefixes."""
        return False

    def take(self, room: int, soft_room: int, is_first: bool) -> SlowPiece | None:
        """As many solutions as fit."""
        used = 0
        while self.open and used < room and (used + self.open[0] <= soft_room or (is_first and used == 0)):
            used += self.open.pop(0)
        return SlowPiece(used) if used else None


def _open() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@dataclass
class SlowEngine:
    """Each solution's result is its number of tokens. Passes wait for the `gate`, which is open by default."""

    tokens_per_s: float = 1e9
    gate: threading.Event = field(default_factory=_open)
    passes: list[dict[str, int]] = field(default_factory=list)

    def estimate(self, request: SlowRequest) -> int:
        """Its tokens."""
        return sum(request.solutions)

    def prepare(self, request: SlowRequest) -> SlowWork:
        """The request as work."""
        return SlowWork(request, list(request.solutions))

    def forward(self, pieces: Sequence[tuple[SlowWork, SlowPiece]]) -> None:
        """Wait as long as the tokens take."""
        self.passes.append({work.request.name: piece.num_tokens for work, piece in pieces})
        assert self.gate.wait(30)
        time.sleep(sum(piece.num_tokens for _, piece in pieces) / self.tokens_per_s)
        # All pieces or none, as a real engine.
        if any(work.request.name == "broken" for work, _ in pieces):
            raise ArithmeticError("broken")
        for work, piece in pieces:
            work.num_read += piece.num_tokens

    def is_complete(self, work: SlowWork) -> bool:
        """Whether all of it was read."""
        return work.num_read == sum(work.request.solutions)

    def cache_figures(self) -> NoCache:
        """Nothing is kept."""
        return NoCache()

    def result(self, work: SlowWork) -> list[float]:
        """The solutions' numbers of tokens."""
        return [float(tokens) for tokens in work.request.solutions]


@dataclass(frozen=True)
class SlowScores:
    """Log-odds of one solution's steps."""

    text_log_odds: Sequence[float]
    image_log_odds: Sequence[float]
    error: str | None = None


class SlowModel:
    """`SlowEngine` for cases of the service: a token a word; a step's log-odds are its number of words and `bias`, by
    which one model's answers are told from another's."""

    def __init__(self, tokens_per_s: float, bias: float = 0.0) -> None:
        self.engine = SlowEngine(tokens_per_s)
        self.bias = bias

    def estimate(self, request: ModelInput) -> int:
        """Its words."""
        return sum(map(_num_words, request.solutions))

    def prepare(self, request: ModelInput) -> SlowWork:
        """The request as work."""
        solutions = list(map(_num_words, request.solutions))
        work = self.engine.prepare(SlowRequest(request.context_key, solutions))
        work.case = request
        return work

    def forward(self, pieces: Sequence[tuple[SlowWork, SlowPiece]]) -> None:
        """Wait as long as the words take."""
        self.engine.forward(pieces)

    def is_complete(self, work: SlowWork) -> bool:
        """Whether all of it was read."""
        return self.engine.is_complete(work)

    def cache_figures(self) -> NoCache:
        """Nothing is kept."""
        return NoCache()

    def result(self, work: SlowWork) -> list[SlowScores]:
        """The scores of the case's solutions."""
        assert work.case is not None
        scores = []
        for solution in work.case.solutions:
            log_odds = [len(step.split()) + self.bias for step in _steps(solution)]
            scores.append(SlowScores(log_odds, [0.0] * len(log_odds)))
        return scores


def _steps(solution: str | Sequence[str]) -> list[str]:
    return [solution] if isinstance(solution, str) else list(solution)


def _num_words(solution: str | Sequence[str]) -> int:
    return sum(len(step.split()) for step in _steps(solution))
