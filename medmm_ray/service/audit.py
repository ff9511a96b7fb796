"""One line a request for whoever must answer who asked what: the key's name, the case's hash, counts. Never content.

Counts come from the routes through `tally`, which stands for the request that is being answered.
"""

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.keys import Key
from medmm_ray.service.metrics import route_of
from medmm_ray.service.quotas import Quotas
from medmm_ray.service.request_ids import request_id
from medmm_ray.service.rerank import ModelInput

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file

KEY = "medmm_key"  # where the guard leaves a request's key in its scope
HASH_CHARACTERS = 16


@dataclass
class Tally:
    """What a request asked for so far."""

    cases: list[str] = field(default_factory=list)
    num_solutions: int = 0
    num_unscored: int = 0
    num_tokens: int = 0
    fingerprint: str = ""
    """That of the model."""

    def add(self, case: ModelInput, fingerprint: str, num_unscored: int, num_tokens: int) -> None:
        """Note a case that the model of this fingerprint read, by the hash of all but its solutions."""
        self.fingerprint = fingerprint
        self.cases.append(case.context_key[:HASH_CHARACTERS])
        self.num_solutions += len(case.solutions)
        self.num_unscored += num_unscored
        self.num_tokens += num_tokens


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


def tally() -> Tally:
    """That of the request being answered; outside of one, one that nobody reads."""
    return _tally.get() or Tally()


class Audit:
    """Middleware around the guard: charges tokens to the request's key and writes its line, refused ones' too."""

    def __init__(self, app: ASGIApp, quotas: Quotas, fingerprint: str) -> None:
        self.app = app
        self.quotas = quotas
        self.fingerprint = fingerprint  # of the model that requests meet which name no other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note it once it is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 499  # until an answer begins: the client may go before

        async def send_noting(message: Message) -> None:
            """`send`, noting the status."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counts = Tally(fingerprint=self.fingerprint)
        token = _tally.set(counts)
        try:
            await self.app(scope, receive, send_noting)
        finally:
            _tally.reset(token)
            key: Key | None = scope.get(KEY)
            if key is not None:
                self.quotas.add_tokens(key, counts.num_tokens)
            # Probes and pages of the service itself would drown the rest.
            if counts.cases or status >= 400:
                self._write(scope, key, counts, status, time.perf_counter() - started)

    def _write(self, scope: Scope, key: Key | None, counts: Tally, status: int, seconds: float) -> None:
        logger.info(
            "audit: id=%s key=%s route=%s status=%d model=%s cases=%s solutions=%d unscored=%d tokens=%d seconds=%.3f",
            request_id(scope),
            key.name if key else "-",
            route_of(scope),
            status,
            counts.fingerprint,
            ",".join(counts.cases) or "-",
            counts.num_solutions,
            counts.num_unscored,
            counts.num_tokens,
            seconds,
        )
