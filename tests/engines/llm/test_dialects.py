"""How servers differ: the real client and judge against each row of a table, what they make of it and what it costs.

Prices are 1 US dollar per million prompt and completion tokens, so that a token costs a millionth.
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.benches.model_server import Answer, chat_completion
from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Sampling
from medmm_ray.engines.llm.access import Access, connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply, ChatRequest, EndpointError, RetryableError, Turn
from medmm_ray.engines.llm.faults import ServerError, fault_of, http_error, refused_field
from medmm_ray.engines.llm.gemini import GeminiEndpoint, GeminiSdkEndpoint, sdk_is_installed
from medmm_ray.engines.llm.openai import OpenAIEndpoint, chat_url, key_header
from medmm_ray.engines.llm.policy import ApiPolicy
from medmm_ray.steps.judge import JudgeApi, JudgeCase, JudgeConfig, Judgement, make_judge
from tests.doubles.api_server import DIALECTS, Server, failed, openai_error, serving

CASE = JudgeCase(
    question_id="q", question="Which side?", options=["left", "right"], answer="A", images=[], documents=[],
    references=[],
)  # fmt: skip
STEPS = ["The left angle is blunt.", "So the answer is (A)."]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    with serving() as running:
        yield running


def entry(step: int, sign: str) -> dict[str, Any]:
    tests = {"logical": True, "medical": sign == "+", "image_grounded": True}
    return {"step": step, "reason": "r", **tests, "verdict": sign, "confidence": "high"}


GOOD = json.dumps({"steps": [entry(1, "+"), entry(2, "-")]})
DRAFT = json.dumps({"steps": [entry(1, "-"), entry(2, "-")]})


def chat(content: Any, finish: str = "stop", usage: Any = (900, 120), **message: Any) -> Answer:
    """An answer of the chat protocol; `usage` are prompt and completion tokens and, where it is stated, all."""
    counts = usage and dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), usage, strict=False))
    return Answer(chat_completion("m", {"content": content, **message}, counts, finish))


def google(finish: str = "STOP", *parts: Any, read: int = 900, total: int = 1020, **more: Any) -> Answer:
    """An answer of Gemini's own protocol."""
    content = {"role": "model", **({"parts": list(parts)} if parts else {})}
    usage = {"promptTokenCount": read, "totalTokenCount": total}
    return Answer({"candidates": [{"finishReason": finish, "content": content}], "usageMetadata": usage, **more})


def inside_200(code: Any, message: str, **more: Any) -> Answer:
    """An error in the body of a 200, as OpenRouter has it."""
    return Answer({"id": None, "choices": None, "error": {"message": message, "code": code, **more}})


UPSTREAM_CHOICE = {
    "index": 0,
    "finish_reason": "error",
    "error": {"code": 502, "message": "Upstream overloaded"},
    "message": {"role": "assistant", "content": '{"steps": ['},
}
FILTERED = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}},
    }
}
MODERATED = {
    "error": {
        "code": 403,
        "message": 'anthropic/claude requires moderation on Anthropic. Your input was flagged for "harm".',
        "metadata": {"reasons": ["harm"], "flagged_input": "...", "provider_name": "Anthropic"},
    }
}
TOO_LONG = "Requested token count exceeds the model's maximum context length of 4096 tokens."


@dataclass(frozen=True)
class Row:
    """What a server of a dialect answers; expected are two labels or a fault, calls, tokens paid, calls lost."""

    dialect: str
    script: list[Answer]
    expected: list[int] | str
    calls: int
    tokens: int
    lost: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


THOUGHT = "judge_reply: judge's answer was cut off at max_tokens=4096 before it began: all tokens went into thoughts"
EMPTY = "judge_reply: judge's answer is empty"

ROWS = {
    # The plain answer of each; what a server does not take is asked once more, unpaid.
    "openai": Row("openai", [chat(GOOD)], [1, 0], 1, 1020),
    "a gpt that thinks, at its own temperature": Row(
        "openai, a model that thinks", [chat(GOOD)], [1, 0], 1, 1020, settings={"temperature": None}
    ),
    "azure": Row("azure", [chat(GOOD)], [1, 0], 1, 1020),
    "vllm": Row("vllm", [chat(GOOD)], [1, 0], 1, 1020),
    "vllm 0.5": Row("vllm 0.5", [chat(GOOD)], [1, 0], 2, 1020),
    "litellm": Row("litellm", [chat(GOOD)], [1, 0], 2, 1020),
    "mistral": Row("mistral", [chat(GOOD)], [1, 0], 2, 1020),
    "mistral, its name set": Row(
        "mistral", [chat(GOOD)], [1, 0], 1, 1020, settings={"length_field": "max_tokens"}
    ),
    "claude takes a temperature or a top_p": Row("claude", [chat(GOOD)], [1, 0], 2, 1020),
    "deepseek knows JSON without a schema": Row(
        "deepseek", [chat(GOOD)], [1, 0], 1, 1020, settings={"form": "object"}
    ),
    "gemini's compatible address leaves thoughts out of its count": Row(
        "gemini, compatible", [chat(GOOD, usage=(900, 120, 1620))], [1, 0], 1, 1620
    ),
    "gemini": Row("gemini", [google("STOP", {"text": GOOD})], [1, 0], 1, 1020),
    # Thoughts
    "vllm: the answer in reasoning": Row("vllm", [chat(None, reasoning=GOOD)], [1, 0], 1, 1020),
    "sglang: the answer in reasoning_content": Row("sglang", [chat("", reasoning_content=GOOD)], [1, 0], 1, 1020),
    "thoughts beside the answer are not read": Row(
        "sglang", [chat(GOOD, reasoning_content=DRAFT)], [1, 0], 1, 1020
    ),
    "thoughts in front of the answer are not read": Row(
        "vllm", [chat(f"<think>{DRAFT}</think>\n{GOOD}")], [1, 0], 1, 1020
    ),
    "a draft in thoughts is no answer": Row(
        "vllm", [chat(None, reasoning=f"Perhaps {DRAFT}?")],
        f"{EMPTY} (120 tokens, thoughts among them); {len(DRAFT) + 9} characters of reasoning beside it are not of the",
        2, 2040,
    ),
    "thoughts that never end hold no answer": Row("vllm", [chat(f"<think>{DRAFT}")], EMPTY, 2, 2040),
    "a thought that was cut off holds no answer": Row(
        "vllm", [chat(None, "length", (900, 4096), reasoning=DRAFT)], THOUGHT, 2, 2 * 4996
    ),
    "mistral: thoughts are parts": Row(
        "mistral",
        [chat([{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}, {"type": "text", "text": GOOD}])],
        [1, 0], 2, 1020,
    ),
    "an empty answer is asked again where turns must alternate": Row(
        "vllm", [chat(""), chat(GOOD)], [1, 0], 2, 2040
    ),
    "an empty answer is asked again where no turn may be empty": Row(
        "claude", [chat(""), chat(GOOD)], [1, 0], 3, 2040
    ),
    "gemini: STOP without a part": Row(
        "gemini", [google(total=900), google("STOP", {"text": GOOD})], [1, 0], 2, 900 + 1020
    ),
    "gemini: all spent on thoughts": Row("gemini", [google("MAX_TOKENS", total=4996)], THOUGHT, 2, 2 * 4996),
    "gemini: a part of white space": Row("gemini", [google("STOP", {"text": "\n"})], EMPTY, 2, 2040),
    # Errors in a 200
    "openrouter: a rate limit": Row(
        "openrouter", [inside_200(429, "Provider returned error", metadata={"raw": "Too Many Requests"}), chat(GOOD)],
        [1, 0], 2, 1020,
    ),
    "openrouter: nothing but rate limits": Row(
        "openrouter", [inside_200(429, "Provider returned error", metadata={"raw": "Too Many Requests"})],
        "unavailable: openai:m failed 3 times, last: 429: Provider returned error: Too Many Requests", 3, 0,
    ),
    "litellm: a rate limit, its code a text": Row(
        "litellm", [inside_200("429", "litellm.RateLimitError: slow down"), chat(GOOD)], [1, 0], 3, 1020
    ),
    "an error without a code": Row("openrouter", [inside_200(None, "upstream"), chat(GOOD)], [1, 0], 2, 1020),
    "an error that is a text": Row("openrouter", [Answer({"error": "overloaded"}), chat(GOOD)], [1, 0], 2, 1020),
    "openrouter: a flagged input": Row(
        "openrouter", [inside_200(403, "The input was flagged")],
        "refused: m did not answer (content filter): The input was flagged", 1, 0,
    ),
    "openrouter: forbidden, of this text": Row(
        "openrouter", [inside_200(403, "Forbidden")], "request: m answered 403: Forbidden", 1, 0
    ),
    "openrouter: a choice that ended by an error is counted as far as it came": Row(
        "openrouter",
        [Answer({"choices": [UPSTREAM_CHOICE], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}), chat(GOOD)],
        [1, 0], 2, 11 + 1020,
    ),
    "sglang: aborted": Row("sglang", [chat(None, "abort", None), chat(GOOD)], [1, 0], 2, 1020),
    "a flat error in a 200": Row(
        "sglang", [Answer({"object": "error", "message": TOO_LONG, "type": "BadRequestError", "code": 400})],
        "prompt_too_long: m answered 400: Requested token count", 1, 0,
    ),
    "google's list in a 200": Row(
        "gemini, compatible", [Answer([{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}])],
        "unavailable: openai:m failed 3 times, last: 503: overloaded", 3, 0,
    ),
    "no JSON in a 200 may have been paid": Row("openrouter", [Answer("<html>")], "unavailable: ", 3, 0, lost=3),
    "no choices, but a count": Row(
        "vllm", [Answer({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0}})],
        "unavailable: openai:m failed 3 times, last: a garbled answer", 3, 27,
    ),
    # Filters
    "azure: a filtered prompt": Row(
        "azure", [Answer(FILTERED, 400)], "refused: m did not answer (content filter): The response was filtered", 1, 0
    ),
    "azure: a filtered answer": Row(
        "azure", [chat(None, "content_filter")], "refused: m did not answer (content filter)", 1, 1020
    ),
    "openrouter: a moderated prompt, by its status": Row(
        "openrouter", [Answer(MODERATED, 403)],
        "refused: m did not answer (content filter): anthropic/claude requires moderation", 1, 0,
    ),
    "openai: a prompt against the usage policy": Row(
        "openai", [Answer({"error": {"message": "Invalid prompt: your prompt was flagged as potentially violating "
                                                   "our usage policy.", "code": "invalid_prompt"}}, 400)],
        "refused: m did not answer (content filter): Invalid prompt", 1, 0,
    ),
    "gemini's compatible address passes its reasons on": Row(
        "gemini, compatible", [chat(None, "PROHIBITED_CONTENT", (900, 0))],
        "refused: m did not answer (PROHIBITED CONTENT)", 1, 900,
    ),
    "gemini: RECITATION": Row(
        "gemini", [google("RECITATION", total=950)], "refused: m did not answer (RECITATION)", 1, 950
    ),
    "gemini: a blocked prompt, counted": Row(
        "gemini",
        [Answer({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 900}})],
        "refused: m blocked the prompt (SAFETY)", 1, 900,
    ),
    "gemini: a blocked prompt, not counted": Row(
        "gemini", [Answer({"promptFeedback": {"blockReason": "OTHER"}})],
        "refused: m blocked the prompt (OTHER)", 1, 0,
    ),
    # Faults by status
    "vllm: too long": Row(
        "vllm", [Answer({"error": {"message": "The decoder prompt (length 9) is longer than the maximum model "
                                                 "length of 8.", "type": "BadRequestError", "code": 400}}, 400)],
        "prompt_too_long: m answered 400: The decoder prompt", 1, 0,
    ),
    "a field's value, not the field": Row(
        "openai", [Answer({"error": {"message": "`max_completion_tokens` must be less than or equal to `8192`",
                                        "type": "invalid_request_error", "param": "max_completion_tokens"}}, 400)],
        "request: m answered 400: `max_completion_tokens` must be less", 1, 0,
    ),
    "mistral: overloaded": Row(
        "mistral", [failed(503, "overloaded"), chat(GOOD)], [1, 0], 3, 1020
    ),
}  # fmt: skip


def clients_of(dialect: str) -> list[str | None]:
    """By which clients a dialect is spoken."""
    if DIALECTS[dialect].backend != "gemini":
        return [None]
    return ["rest", *(["sdk"] if sdk_is_installed() else [])]


BOTH = [
    pytest.param(name, client, id=name + (f" ({client})" if client else ""))
    for name, row in ROWS.items()
    for client in clients_of(row.dialect)
]


@pytest.mark.parametrize(("name", "client"), BOTH)
def test_a_server_is_spoken_to_in_its_dialect(server: Server, tmp_path: Path, name: str, client: Any) -> None:
    row = ROWS[name]
    dialect = DIALECTS[row.dialect]
    server.dialect, server.script = dialect, list(row.script)
    settings = {"endpoint": dialect.address(server), "gemini_client": client}
    settings |= {"input_price": 1.0, "output_price": 1.0, "pause_s": 0.001, "max_attempts": 3}
    engine: dict[str, Any] = {"kind": dialect.backend, "model": "m"}
    parts = {"api": settings, "engine": engine, "judge": {}}
    for name, value in row.settings.items():
        part = "judge" if name in JudgeConfig.model_fields else "engine" if name in JudgeApi.model_fields else "api"
        parts[part][name] = value
    judge_engine = JudgeApi(**engine)
    config = JudgeConfig(engine=judge_engine, **parts["judge"])
    api = ApiConfig(**settings)
    budget = ApiBudget(str(tmp_path), api.limits)
    judge = make_judge(config, "m", access=Access(judge_engine, "m", api, budget, str(tmp_path)))
    [found] = asyncio.run(judge.judge(CASE, [STEPS]))
    labels = [step.label for step in found.steps] if isinstance(found, Judgement) else str(found)
    if isinstance(row.expected, str):
        assert str(labels).startswith(row.expected)
    else:
        assert labels == row.expected
    assert len(server.requests) == row.calls
    assert budget.ledger.spent * 1e6 == pytest.approx(row.tokens)
    assert budget.ledger.lost_calls == row.lost
    assert (budget.ledger.possibly_paid > 0) == (row.lost > 0)


def test_every_dialect_is_spoken() -> None:
    assert {row.dialect for row in ROWS.values()} == set(DIALECTS)


def test_the_same_request_goes_again_after_an_error_in_a_200(server: Server) -> None:
    server.script = [inside_200(502, "Upstream"), chat("yes")]
    answer = asyncio.run(client(server).ask(QUESTION, "q"))
    assert (answer.reply.text, server.requests[0]) == ("yes", server.requests[1])


def test_what_faults_cost_is_in_the_rows_error(server: Server) -> None:
    server.script = [Answer({"choices": [UPSTREAM_CHOICE], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})]
    with pytest.raises(RowError, match="last: 502: Upstream overloaded") as fault:
        asyncio.run(client(server).ask(QUESTION, "q"))
    assert fault.value.cost * 1e6 == pytest.approx(3 * 11)


def test_one_flagged_text_never_ends_a_job(server: Server, tmp_path: Path) -> None:
    server.script = [Answer(MODERATED, 403), chat("yes")]

    async def both() -> list[Any]:
        asker = client(server, tmp_path)
        return [await asyncio.gather(asker.ask(question(text), "q"), return_exceptions=True) for text in ("a", "b")]

    [first], [second] = asyncio.run(both())
    assert (first.kind, second.reply.text) == ("refused", "yes")


# Fields that a server does not take

QUESTION = ChatRequest("s", (Turn("user", ("a",)),), max_tokens=4096)


def question(text: str, **how: Any) -> ChatRequest:
    return ChatRequest("s", (Turn("user", (text,)),), **{"max_tokens": 4096, **how})


def client(server: Server, folder: Path | None = None, dialect: str | None = None, **settings: Any) -> Client:
    if dialect is not None:
        server.dialect = DIALECTS[dialect]
    address = server.dialect.address(server) if server.dialect else f"{server.address}/v1"
    engine = ApiEngine(kind="openai", reasoning_effort=settings.pop("reasoning_effort", None))
    config = ApiConfig(
        endpoint=address, pause_s=0.001, max_attempts=3, input_price=1.0, output_price=1.0, **settings
    )  # fmt: skip
    budget = ApiBudget(str(folder), config.limits) if folder else None
    return connect(engine, "m", config, budget, str(folder) if folder else None)


def test_a_name_that_is_refused_is_remembered_and_said_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.script = [chat("yes")]

    async def ask() -> None:
        asker = client(server, dialect="mistral")
        await asyncio.gather(*(asker.ask(question(text), "q") for text in "abc"))
        await asyncio.gather(*(asker.ask(question(text), "q") for text in "def"))

    with caplog.at_level(logging.WARNING, "medmm_ray"):
        asyncio.run(ask())
    names = ["max_completion_tokens" if "max_completion_tokens" in body else "max_tokens" for body in server.requests]
    assert sorted(names[:-3]) == ["max_completion_tokens"] * 3 + ["max_tokens"] * 3
    assert names[-3:] == ["max_tokens"] * 3
    assert {body.get("max_tokens", 4096) for body in server.requests} == {4096}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["m takes no max_completion_tokens; from now on it gets max_tokens"]


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("openai", {"seed": 7, "max_completion_tokens": 50}),
        ("mistral", {"random_seed": 7, "max_tokens": 50}),
        ("gemini, compatible", {"max_completion_tokens": 50}),
    ],
)
def test_samples_have_the_seed_that_a_server_knows(server: Server, dialect: str, expected: dict[str, int]) -> None:
    server.script = [chat("Step 1: Look.")]
    prompt = ChatPrompt([{"role": "user", "content": "What is it?"}])
    made = asyncio.run(ApiPolicy(client(server, dialect=dialect)).generate(prompt, 1, 7, Sampling(max_tokens=50)))
    assert [sample.text for sample in made] == ["Step 1: Look."]
    fields = {"seed", "random_seed", "max_tokens", "max_completion_tokens"}
    assert {name: value for name, value in server.requests[-1].items() if name in fields} == expected


def test_a_policy_of_an_api_may_have_its_own_temperature(server: Server) -> None:
    server.script = [chat("Step 1: Look.")]
    prompt = ChatPrompt([{"role": "user", "content": "What is it?"}])
    policy = ApiPolicy(client(server, dialect="openai, a model that thinks"))
    asyncio.run(policy.generate(prompt, 1, 7, Sampling(temperature=None, top_p=None, max_tokens=50)))
    asyncio.run(policy.generate(prompt, 1, 8, Sampling(temperature=None, top_p=1.0, max_tokens=50)))
    [first, second] = server.requests
    assert not {"temperature", "top_p"} & {*first, *second}


@pytest.mark.parametrize(
    ("dialect", "how", "message"),
    [
        (
            "openai, a model that thinks",
            {},
            r"m takes no temperature=0\.0; set temperature to null .*does not support 0",
        ),
        (
            "openai, a model that thinks",
            {"temperature": None, "top_p": 0.5},
            r"m takes no top_p=0\.5; set top_p to null",
        ),
        ("claude", {"temperature": 0.5, "top_p": 0.5}, r"m takes no top_p=0\.5; set top_p to null"),
        ("deepseek", {"schema": {"type": "object"}}, "m does not take the JSON schema .* set form to object or text"),
    ],
)
def test_what_a_setting_must_say_ends_the_job_before_anything_is_paid(
    server: Server, tmp_path: Path, dialect: str, how: dict[str, Any], message: str
) -> None:
    """To send something else in its place would be kept, and read, as if it were what was asked."""
    server.script = [chat("yes")]
    asker = client(server, tmp_path, dialect)
    with pytest.raises(EndpointError, match=message):
        asyncio.run(asker.ask(question("a", **how), "q"))
    assert len(server.requests) == 1
    assert isinstance(asker.budget, ApiBudget)
    assert (asker.budget.ledger.spent, asker.budget.ledger.possibly_paid) == (0.0, 0.0)


def test_a_field_that_was_taken_once_is_not_the_fault(server: Server) -> None:
    """A text that is quoted in an error can end no job."""
    quoted = openai_error("Unsupported parameter: 'temperature' is not supported with this model.", None, None)
    server.script = [chat("yes"), quoted, chat("no")]

    async def ask() -> list[Any]:
        asker = client(server)
        asks = (asker.ask(question(text), "q") for text in "abc")
        return [await asyncio.gather(one, return_exceptions=True) for one in asks]

    [first], [second], [third] = asyncio.run(ask())
    assert (first.reply.text, second.kind, third.reply.text) == ("yes", "request", "no")


def test_a_name_that_was_set_is_the_only_one(server: Server) -> None:
    server.script = [chat("yes")]
    with pytest.raises(EndpointError, match="m takes no such field; set length_field to null or max_tokens"):
        asyncio.run(client(server, dialect="mistral", length_field="max_completion_tokens").ask(QUESTION, "q"))
    assert len(server.requests) == 1


def test_a_server_that_ignores_the_longest_answer_is_told_of(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """As Ollama and llama-cpp-python do with max_completion_tokens."""
    server.script = [chat("yes", usage=(900, 120))]
    with caplog.at_level(logging.WARNING, "medmm_ray"):
        asker = client(server)
        for text in "ab":
            asyncio.run(asker.ask(question(text, max_tokens=50), "q"))
    assert [record.getMessage() for record in caplog.records] == [
        "m wrote 120 tokens where max_completion_tokens=50 allows 50: its server ignores that name; set length_field"
    ]


PROSE = "Cannot read: 'A temperature is not supported by the notes; they do not support temperature as a sign.'"


@pytest.mark.parametrize(
    ("status", "body", "field_"),
    [
        # As gateways pass them on: the provider's JSON is a text in theirs.
        (400, {"error": {"message": "litellm.BadRequestError: OpenAIException - {\n \"error\": {\n \"message\": "
                                    "\"Unsupported parameter: 'temperature' is not supported with this model.\""}},
         "temperature"),
        (400, {"error": {"message": "Provider returned error", "code": 400, "metadata": {
            "raw": "{\"error\": {\"message\": \"Unsupported parameter: 'max_completion_tokens'\"}}"}}},
         "max_completion_tokens"),
        (400, {"error": {"message": "litellm.UnsupportedParamsError: gpt-5 models (including gpt-5-codex) don't "
                                    "support temperature=0.7. Only temperature=1 is supported."}}, "temperature"),
        (400, {"message": "This model doesn't support the temperature field. Remove temperature and try again."},
         "temperature"),
        (400, {"error": {"message": "`temperature` is deprecated for this model."}}, "temperature"),
        (400, {"error": {"message": "Unrecognized request argument supplied: max_completion_tokens"}},
         "max_completion_tokens"),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}, "seed"),
        (400, {"error": {"message": PROSE}}, None),
        (400, {"error": {"message": "max_tokens is too large: 99999.", "param": "max_completion_tokens"}}, None),
        (400, {"error": {"message": "This model does not support image input."}}, None),
        (500, {"error": {"message": "Unsupported parameter: 'temperature'"}}, None),
    ],
)  # fmt: skip
def test_which_field_a_server_does_not_take(status: int, body: Any, field_: str | None) -> None:
    sent = ("model", "messages", "temperature", "top_p", "max_completion_tokens", "seed")
    assert refused_field(http_error(status, json.dumps(body).encode()), sent) == field_


# What an error means


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (400, "Content Exists Risk", "refused"),  # DeepSeek
        (400, '{"error": {"code": "data_inspection_failed"}}', "refused"),  # DashScope
        (400, "litellm.ContentPolicyViolationError: no", "refused"),
        (403, "Content violates usage guidelines.", "refused"),  # xAI
        (403, "Your account was suspended", "EndpointError"),
        (403, '{"error": {"message": "Account flagged, talk to sales"}}', "EndpointError"),
        (404, "No endpoints found matching your data policy (blocked by guardrail)", "EndpointError"),
        (400, "litellm.ContextWindowExceededError: too much", "prompt_too_long"),
        (400, "The input (9 tokens) is longer than the model's context length (8 tokens).", "prompt_too_long"),
        (402, "Insufficient credits", "EndpointError"),
    ],
)
def test_what_a_status_means_with_its_words(status: int, said: str, expected: str) -> None:
    fault = fault_of("m", ServerError(status, said, said), None, "KEY")
    assert (fault.kind if isinstance(fault, RowError) else type(fault).__name__) == expected


# Addresses and keys


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("https://h/v1/chat/completions/", "https://h/v1/chat/completions"),
        (
            "https://r.openai.azure.com/openai/deployments/d?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
    ],
)
def test_where_an_address_takes_chats(address: str, url: str) -> None:
    assert chat_url(address) == url


@pytest.mark.parametrize(
    ("url", "header"),
    [
        ("https://api.openai.com/v1/chat/completions", {"Authorization": "Bearer k"}),
        ("https://r.openai.azure.com/openai/v1/chat/completions", {"api-key": "k"}),
        ("https://gateway/openai/deployments/d/chat/completions?api-version=2024-10-21", {"api-key": "k"}),
    ],
)
def test_which_header_carries_the_key(url: str, header: dict[str, str]) -> None:
    assert key_header(url, "k") == header


# Gemini with its package and without

GEMINI_ANSWERS: list[Answer] = [
    google("STOP", {"text": GOOD}, modelVersion="m-001"),
    google("STOP", {"text": "two "}, {"text": "parts"}),
    google("MAX_TOKENS", {"text": "cut"}),
    google("MAX_TOKENS", total=4996),
    google(total=900),
    google("SAFETY", total=905),
    google("OTHER", {"text": "odd"}),
    Answer({"candidates": [{"content": {"parts": [{"text": "uncounted"}]}, "finishReason": "STOP"}]}),
    Answer({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 900}}),
    Answer({"usageMetadata": {"promptTokenCount": 900}}),
    Answer({}),
    failed(429, "Resource has been exhausted", **{"Retry-After": "7"}),
    failed(503, "overloaded"),
    failed(400, "image too odd"),
    failed(400, "The input token count (9) exceeds the maximum number of tokens allowed (8)."),
    failed(403, "denied"),
    failed(400, "API key not valid."),
]


@pytest.mark.parametrize("answer", GEMINI_ANSWERS)
@pytest.mark.parametrize(
    "request_",
    [
        question("a", schema={"type": "object", "properties": {"x": {"type": "array", "items": {"type": "string"}}}}),
        ChatRequest("", (Turn("user", ("a", "")), Turn("model", ("",)), Turn("user", ("b",))), temperature=None, n=2),
    ],
    ids=["schema", "bare"],
)
def test_gemini_by_rest_and_by_its_package_are_the_same(server: Server, answer: Answer, request_: ChatRequest) -> None:
    pytest.importorskip("google.generativeai")
    server.dialect, server.script = DIALECTS["gemini"], [answer]

    def outcome(endpoint: Any) -> Any:
        try:
            return asyncio.run(endpoint.send(request_))
        except RetryableError as fault:
            return str(fault), fault.retry_after_s, fault.maybe_paid, fault.billed
        except (RowError, EndpointError) as fault:
            return type(fault), str(fault)

    rest = outcome(GeminiEndpoint("m", address=server.address))
    assert rest == outcome(GeminiSdkEndpoint("m", address=server.address))
    sent, by_package = server.requests
    texts = [("user", "a")] if request_.system else [("user", "a"), ("user", "b")]
    assert sent["contents"] == [{"role": role, "parts": [{"text": text}]} for role, text in texts]
    assert sent["contents"] == by_package["contents"]
    assert sent.get("systemInstruction", {}).get("parts") == by_package.get("systemInstruction", {}).get("parts")


def test_what_gemini_is_asked_by_rest(server: Server) -> None:
    server.dialect, server.script = (
        DIALECTS["gemini"],
        [google("STOP", {"text": "yes"}, {"text": "no", "thought": True})],
    )
    items = {"type": "array", "minItems": 1, "items": {"type": "string", "maxLength": 5}, "additionalProperties": False}
    how = {"schema": {"type": "object", "properties": {"x": items}, "required": ["x"]}, "max_tokens": 7}
    reply = asyncio.run(GeminiEndpoint("m", address=server.address).send(question("a", temperature=0.5, **how)))
    assert reply == ChatReply((ChatChoice("yes", "stop", thoughts=2),), 900, 0, 120)
    assert server.requests == [
        {
            "contents": [{"role": "user", "parts": [{"text": "a"}]}],
            "systemInstruction": {"parts": [{"text": "s"}]},
            "generationConfig": {
                "maxOutputTokens": 7,
                "temperature": 0.5,
                "topP": 1.0,
                "responseMimeType": "application/json",
                "responseSchema": {
                    "type": "OBJECT",
                    "properties": {"x": {"type": "ARRAY", "minItems": 1, "items": {"type": "STRING"}}},
                    "required": ["x"],
                },
            },
        }
    ]


@pytest.mark.parametrize(
    ("model", "effort", "config"),
    [
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0}),
        ("gemini-2.5-flash", "medium", {"thinkingBudget": 8192}),
        ("gemini-3.5-flash-lite", "low", {"thinkingLevel": "low"}),
        ("gemini-3.5-flash-lite", "none", {"thinkingLevel": "minimal"}),
    ],
)
def test_how_much_gemini_may_think(server: Server, model: str, effort: Any, config: dict[str, Any]) -> None:
    """The package has no field for it."""
    server.script = [google("STOP", {"text": "yes"})]
    free = ApiConfig(endpoint=server.address, input_price=0.0, output_price=0.0)
    engine = ApiEngine(kind="gemini", reasoning_effort=effort)
    asyncio.run(connect(engine, model, free).ask(QUESTION, "q"))
    assert server.requests[0]["generationConfig"]["thinkingConfig"] == config
    with pytest.raises(ConfigError, match=f"reasoning_effort={effort} does not go with gemini_client=sdk"):
        connect(engine, model, free.model_copy(update={"gemini_client": "sdk"}))


def test_how_much_a_model_of_a_chat_may_think_is_part_of_what_was_asked(server: Server, tmp_path: Path) -> None:
    server.script = [chat("yes"), chat("no")]
    for effort in (None, "low", "low"):
        asyncio.run(client(server, tmp_path, reasoning_effort=effort).ask(QUESTION, "q"))
    assert [body.get("reasoning_effort") for body in server.requests] == [None, "low"]
    refused = openai_error("Unsupported value: 'reasoning_effort' does not support 'none'.", "reasoning_effort", None)
    server.script = [refused]
    with pytest.raises(EndpointError, match="m takes no reasoning_effort=none; set another, or null"):
        asyncio.run(client(server, reasoning_effort="none").ask(QUESTION, "q"))


def test_keys_of_kept_answers_stay() -> None:
    """Answers were paid for under them."""
    assert question("a").key("openai:m") == "4983e2b5d8804808df41ff3457e3d5f6"


def test_without_its_package_gemini_is_asked_by_rest(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr("medmm_ray.engines.llm.gemini.sdk_is_installed", lambda: False)
    free = ApiConfig(input_price=0.0, output_price=0.0)
    assert isinstance(connect(ApiEngine(kind="gemini"), "m", free).endpoint, GeminiEndpoint)
    monkeypatch.setitem(__import__("sys").modules, "google.generativeai", None)
    with pytest.raises(EndpointError, match="gemini_client=sdk needs the package .* or set gemini_client=rest"):
        connect(ApiEngine(kind="gemini"), "m", free.model_copy(update={"gemini_client": "sdk"}))


def test_an_error_that_is_no_answer_of_openai_is_shown_in_its_words(server: Server) -> None:
    server.script = [Answer({"error": {"message": "odd\nimage", "code": 400}}, 400)]
    with pytest.raises(RowError, match="request: m answered 400: odd image$"):
        asyncio.run(OpenAIEndpoint("m", address=f"{server.address}/v1").send(QUESTION))
