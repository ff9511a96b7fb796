"""A model server that answers by a script, for the tests of API clients: their real packages talk to it.

Which requests it takes at all, and how it says so, is a `Dialect`: a row of `DIALECTS` for each kind of server, after
its documentation, its source or what it was seen to answer.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jobs.benches.model_server import Answer, ModelServer, Received, chat_completion, chat_usage, in_thread

AS_ASKED = "(as asked)"  # of an answer's model: the one that the request names
CUT = Answer("", transfer="none")  # the connection is closed without a word


class Server(ModelServer):
    """Answers each request by the next entry of `script`; the last one again and again.

    What its `dialect` does not take is answered by that, and uses up no entry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.script: list[Answer] = []
        self.dialect: Dialect | None = None
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.delay_s = 0.0
        self.gemini_client: Any = None  # by which of them the tests of Gemini ask
        self.models: list[dict[str, Any]] | None = None  # that the API lists; None: it has no such list

    async def answer(self, request: Received) -> Answer:
        if request.method == "GET":
            return self._listing(request.path)
        self.requests.append(request.body)
        self.times.append(time.monotonic())
        refusal = self.dialect.refusal(request) if self.dialect else None
        answer = refusal or (self.script.pop(0) if len(self.script) > 1 else self.script[0])
        if isinstance(answer.body, dict) and answer.body.get("model") == AS_ASKED:
            answer = answer._replace(body={**answer.body, "model": request.body["model"]})
        await asyncio.sleep(self.delay_s)
        return answer

    def _listing(self, path: str) -> Answer:
        if self.models is None:
            return Answer("no such path", 404)
        return Answer({"models" if path.startswith("/v1beta/models") else "data": self.models})


@contextmanager
def serving() -> Iterator[Server]:
    with in_thread(Server()) as server:
        yield server


def gemini_said(text: str, finish: str = "STOP", model: str | None = None, **usage: int) -> Answer:
    """An answer of Gemini's; `model` is the version that answered, where it is stated."""
    counts = {"promptTokenCount": 1000, "candidatesTokenCount": 100, "totalTokenCount": 1100, **usage}
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish}
    version = {} if model is None else {"modelVersion": model}
    return Answer({"candidates": [candidate], "usageMetadata": counts, **version})


def chat_said(
    text: str | None, finish: str = "stop", cached: int = 0, model: str | None = AS_ASKED, tier: str | None = None,
    **message: Any,
) -> Answer:  # fmt: skip
    """An answer of the chat protocol's, by `model`, at the service `tier`."""
    body = chat_completion(model, {"content": text, **message}, chat_usage(1000, 100, cached), finish)
    return Answer(body if tier is None else {**body, "service_tier": tier})


def failed(status: int, message: str = "no", **headers: str) -> Answer:
    return Answer({"error": {"code": status, "message": message}}, status, headers)


# How servers differ

SDK_QUERY = "?%24alt=json%3Benum-encoding%3Dint"  # how google-generativeai asks for enums as numbers


@dataclass(frozen=True)
class Dialect:
    """What one kind of server takes: a path, a key in a header, and the fields of a body.

    `takes_no` gives, for a field that the server does not take, when it complains (of any value: None) and how.
    """

    path: str = "/v1"
    key: tuple[str, str] = ("Authorization", "Bearer k")
    backend: str = "openai"
    takes_no: Mapping[str, tuple[Callable[[Any], bool] | None, Answer]] = field(default_factory=dict)
    reads: Callable[[Mapping[str, Any]], Answer | None] = lambda body: None  # what else it finds wrong

    def address(self, server: Server) -> str:
        """What a config calls the endpoint."""
        return server.address + self.path

    def refusal(self, request: Received) -> Answer | None:
        """The error by which it answers a request; None where it takes it."""
        path, headers, body = request.path, request.headers, request.body
        place, _, query = self.path.partition("?")
        expected = f"{place}/chat/completions{query and '?' + query}"
        if self.backend == "gemini":
            expected, path = "/v1beta/models/m:generateContent", path.removesuffix(SDK_QUERY)
        if path != expected:
            return failed(404, f"no such path: {path}")
        name, value = self.key
        others = {"Authorization", "api-key", "x-goog-api-key"} - {name}
        if headers.get(name) != value or any(headers.get(other) for other in others) or "=k" in path:
            return failed(401, "the key is not where it is looked for")
        for field_, (complains, answer) in self.takes_no.items():
            if field_ in body and (complains is None or complains(body[field_])):
                return answer
        return self.reads(body)


def openai_error(message: str, param: str | None, code: str | None) -> Answer:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Answer({"error": error}, 400)


def _unsupported_value(name: str) -> tuple[Callable[[Any], bool], Answer]:
    message = (
        f"Unsupported value: '{name}' does not support 0.0 with this model. Only the default (1) value is supported."
    )
    return (lambda value: value != 1), openai_error(message, name, "unsupported_value")


def _mistral(name: str) -> tuple[None, Answer]:
    wrong = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 4096}
    said = {"object": "error", "message": {"detail": [wrong]}, "type": "invalid_request_error", "param": None}
    return None, Answer({**said, "code": None}, 422)


def _google(message: str) -> dict[str, Any]:
    return {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}


def _no_empty_text(body: Mapping[str, Any]) -> Answer | None:
    parts = [part for turn in body["contents"] for part in turn["parts"]]
    if all(part.get("text") != "" for part in parts) and all(turn["parts"] for turn in body["contents"]):
        return None
    return Answer(_google("Unable to submit request because it has an empty text parameter."), 400)


def _turns_alternate(body: Mapping[str, Any]) -> Answer | None:
    roles = [message["role"] for message in body["messages"] if message["role"] != "system"]
    if roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None
    message = "After the optional system message, conversation roles must alternate user/assistant/user/assistant/..."
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return Answer({"error": error}, 400)


def _claude(body: Mapping[str, Any]) -> Answer | None:
    if not all(message["content"] for message in body["messages"]):
        return openai_error("messages: text content blocks must be non-empty", None, None)
    if "temperature" in body and "top_p" in body:
        return openai_error("`temperature` and `top_p` cannot both be specified for this model.", None, None)
    return None


_OLD_VLLM = (
    "[{'type': 'extra_forbidden', 'loc': ('body', 'max_completion_tokens'), 'msg': 'Extra inputs are not permitted', "
    "'input': 4096}]"
)
_LITELLM = (
    "litellm.UnsupportedParamsError: mistral does not support parameters: {'max_completion_tokens': 4096}, for "
    "model=mistral-small-latest. To drop these, set `litellm.drop_params=True`. Received Model Group=m"
)
_ONE_NAME = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

DIALECTS = {
    "openai": Dialect(),
    "openai, a model that thinks": Dialect(
        takes_no={
            "max_tokens": (None, openai_error(_ONE_NAME, "max_tokens", "unsupported_parameter")),
            "temperature": _unsupported_value("temperature"),
            "top_p": _unsupported_value("top_p"),
        }
    ),
    "azure": Dialect("/openai/deployments/d?api-version=2025-04-01-preview", ("api-key", "k")),
    "vllm": Dialect(reads=_turns_alternate),  # as the templates of Gemma and Mistral say
    "vllm 0.5": Dialect(
        takes_no={
            "max_completion_tokens": (
                None, Answer({"object": "error", "message": _OLD_VLLM, "type": "BadRequestError", "code": 400}, 400),
            )
        }
    ),
    "sglang": Dialect(),
    "litellm": Dialect(
        takes_no={
            "max_completion_tokens": (
                None, Answer({"error": {"message": _LITELLM, "type": "None", "param": None, "code": "400"}}, 400),
            )
        }
    ),
    "openrouter": Dialect("/api/v1"),
    "mistral": Dialect(takes_no={name: _mistral(name) for name in ("max_completion_tokens", "seed", "service_tier")}),
    "claude": Dialect(reads=_claude),
    "deepseek": Dialect(
        takes_no={
            "response_format": (
                lambda form: form["type"] == "json_schema",
                openai_error("This response_format type is unavailable now", None, "invalid_request_error"),
            )
        }
    ),
    "gemini, compatible": Dialect(
        "/v1beta/openai",
        takes_no={
            name: (
                None, Answer([_google(f'Invalid JSON payload received. Unknown name "{name}": Cannot find it.')], 400),
            )
            for name in ("seed", "random_seed")
        },
    ),
    "gemini": Dialect("", ("x-goog-api-key", "k"), "gemini", reads=_no_empty_text),
}  # fmt: skip
