"""OpenTelemetry traces of requests, by setting: a span each, with the time in the queue and the time of its passes.

A request's `traceparent` (W3C) is the parent of its span, and the answer's header has the span itself, so that a caller
finds it. Spans hold the route, the status and counts, never text. Without `traces_endpoint` nothing is recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span as RecordedSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray import __version__
from medmm_ray.config import ConfigError
from medmm_ray.service.batching import RequestTimes

_PROPAGATOR = TraceContextTextMapPropagator()
_NANOSECONDS = 1_000_000_000
NO_TRACER: Tracer = trace.NoOpTracer()
"""Records nothing."""


def tracer_to(endpoint: str | None) -> Tracer:
    """A tracer that sends spans to a collector's OTLP address over HTTP, such as http://collector:4318/v1/traces; one
    that records nothing where there is none."""
    if endpoint is None:
        return NO_TRACER
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"traces_endpoint={endpoint} needs opentelemetry-exporter-otlp-proto-http: {error}") from None
    return tracer_with(OTLPSpanExporter(endpoint=endpoint))


def tracer_with(exporter: SpanExporter) -> Tracer:
    """A tracer whose spans go to `exporter`, some at a time, on a thread of its own."""
    # A provider of our own: the process's global one is Ray's.
    provider = TracerProvider(resource=Resource.create({"service.name": "medmm_ray", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("medmm_ray")


class TraceRequests:
    """Middleware that makes a span of each request."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on inside its span."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # A caller without a trace, or with a broken one, begins a new one.
        parent = _PROPAGATOR.extract(headers)
        name = f"{scope['method']} {scope['path'][:80]}"
        with self.tracer.start_as_current_span(name, parent, SpanKind.SERVER) as span:
            await self.app(scope, receive, _noting(send, span))


def _noting(send: Send, span: Span) -> Send:
    """`send`, which notes the status in the span and names the span in the answer."""

    async def send_noting(message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start" and span.is_recording():
            span.set_attribute("http.response.status_code", message["status"])
            carrier: dict[str, str] = {}
            _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
            own = [(name.encode(), value.encode()) for name, value in carrier.items()]
            message["headers"] = [*message["headers"], *own]
        await send(message)

    return send_noting


@contextmanager
def score_spans(tracer: Tracer, times: RequestTimes, counts: dict[str, Any]) -> Iterator[None]:
    """A span of the scoring that the block does, with one for tokenizing, queue and passes each, from `times`."""
    with tracer.start_as_current_span("score", attributes=counts) as span:
        yield
        if not isinstance(span, RecordedSpan) or span.start_time is None:
            return
        span.set_attribute("tokens", times.num_tokens)
        # After the fact: the parts happen on other threads, which know no span.
        start = span.start_time
        parts = (("tokenize", times.prepared_s), ("queue", times.queued_s), ("passes", times.scored_s))
        for name, seconds in parts:
            end = start + int(seconds * _NANOSECONDS)
            tracer.start_span(name, start_time=start).end(end)
            start = end
