"""Spans of requests: whose children they are, what they hold, and that they hold no text."""

import asyncio
import json

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobs.benches.slow_engine import SlowModel
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.replica import ReplicaScorer
from medmm_ray.service.rerank import ModelTraits
from medmm_ray.service.tracing import tracer_to
from tests.service.test_admission import BODY, web

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def spans_of(headers: dict[str, str], tokens_per_s: float = 2000.0) -> tuple[list[ReadableSpan], dict[str, str]]:
    """The spans of one request, and the headers of its answer."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    config = ServeConfig(model="m")
    scorer = ReplicaScorer(SlowModel(tokens_per_s), config, 1024, provider.get_tracer("test"))
    backend = Backend(scorer.score, config, ModelTraits(False), Readiness([]), check=scorer.check)
    app = api(Models.single(backend), None, tracer=provider.get_tracer("test"))

    async def ask() -> dict[str, str]:
        async with web(app) as client:
            reply = await client.post("/v1/rerank", json=BODY, headers=headers)
            assert reply.status_code == 200
            return dict(reply.headers)

    try:
        answer = asyncio.run(ask())
    finally:
        scorer.batcher.close()
    return list(exporter.get_finished_spans()), answer


def test_a_request_is_a_child_of_its_caller_and_its_answer_names_it() -> None:
    spans, answer = spans_of({"traceparent": f"00-{TRACE}-{PARENT}-01"})
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /v1/rerank", "score", "tokenize", "queue", "passes"}
    request = by_name["POST /v1/rerank"]
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    assert request.parent is not None
    assert format(request.parent.span_id, "016x") == PARENT
    assert answer["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"
    score = by_name["score"]
    for name in ("tokenize", "queue", "passes"):
        parent = by_name[name].parent
        assert parent is not None
        assert parent.span_id == score.context.span_id
    assert dict(request.attributes or {}) == {"http.response.status_code": 200}
    # Eight words at 2,000 a second.
    passes = by_name["passes"]
    assert passes.start_time is not None
    assert passes.end_time is not None
    assert passes.end_time - passes.start_time >= 4_000_000


def test_spans_hold_counts_and_no_text() -> None:
    spans, _ = spans_of({})
    (score,) = [span for span in spans if span.name == "score"]
    assert dict(score.attributes or {}) == {"solutions": 1, "documents": 0, "images": 0, "tokens": 8}
    written = json.dumps([json.loads(span.to_json()) for span in spans])
    for words in ("Which side", "one two three"):
        assert words not in written


def test_nothing_is_recorded_without_an_endpoint() -> None:
    with tracer_to(None).start_as_current_span("x") as span:
        assert not span.is_recording()


@pytest.mark.parametrize("traceparent", ["", "junk", "00-0-0-00"])
def test_a_broken_parent_is_none(traceparent: str) -> None:
    spans, answer = spans_of({"traceparent": traceparent}, 1e6)
    assert [span.parent for span in spans if span.name == "POST /v1/rerank"] == [None]
    assert answer["traceparent"].startswith("00-")
