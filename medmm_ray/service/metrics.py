"""What the service counts, in Prometheus' text format: requests, solutions, steps, tokens, seconds. No text, no names.

Each replica counts for itself, and `GET /metrics` gives those of the one that answers: enough where there is one. What
`exported` holds is counted too, for Ray's agents, which label each replica's counts and are scraped node by node.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.rerank import Scored

# From a cached prefix's few milliseconds to a request that fills the model for minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


EXPORTED = {
    "solutions": "Solutions scored.",
    "solutions_unscored": "Solutions without a score.",
    "steps": "Steps scored.",
    "tokens": "Tokens that the model read.",
}


class Increases(Protocol):
    """A counter of another library's."""

    def inc(self, value: int, tags: dict[str, str]) -> None:
        """Add a number above 0 to the counter of these labels."""


class ServiceMetrics:
    """The counters of one replica, in a registry of their own; those of scores go to `exported` too, by their names."""

    def __init__(self, exported: Mapping[str, Increases] | None = None) -> None:
        self._exported = exported or {}
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "medmm_requests",
            "Requests by route, method and HTTP status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "medmm_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge("medmm_requests_in_progress", "Requests being answered.", registry=self.registry)
        self._of_scores = {
            name: Counter(f"medmm_{name}", what, ["model"], registry=self.registry) for name, what in EXPORTED.items()
        }

    def know(self, model: str) -> None:
        """Begin the counters of a served model: a rate over their first request would not be seen otherwise."""
        for counter in self._of_scores.values():
            counter.labels(model)

    def add_scores(self, scored: Scored, model: str) -> None:
        """Count what the scores of a case hold that the served `model` gave."""
        num_steps = [len(solution.text_log_odds) for solution in scored.solutions if solution.error is None]
        numbers = {
            "solutions": len(num_steps),
            "solutions_unscored": len(scored.solutions) - len(num_steps),
            "steps": sum(num_steps),
            "tokens": scored.num_tokens or 0,
        }
        for name, number in numbers.items():
            self._of_scores[name].labels(model).inc(number)
            # Ray's counters refuse a zero.
            if number and name in self._exported:
                self._exported[name].inc(number, {"model": model})

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class MeasureRequests:
    """Middleware that counts requests and their seconds."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it once it is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 499  # nginx's number for a client that went away before the answer

        async def send_noting(message: Message) -> None:
            """`send`, noting the status."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self.metrics.in_progress.track_inprogress():
                await self.app(scope, receive, send_noting)
        finally:
            route = route_of(scope)
            self.metrics.requests.labels(route, _method(scope["method"]), str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)


METHODS: Sequence[str] = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")


def _method(method: str) -> str:
    return method if method in METHODS else "OTHER"


def route_of(scope: Scope) -> str:
    """The route that answered; `none` for all other paths: a label that clients choose would grow without bound."""
    return str(getattr(scope.get("route"), "path", "none"))
