"""A local HTTP server that answers by a script, for the tests of API clients: their real packages talk to it.

Which requests it takes at all, and how it says so, is a `Dialect`: a row of `DIALECTS` for each kind of server, after
its documentation, its source or what it was seen to answer.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AS_ASKED = "(as asked)"  # of an answer's model: the one that the request names
Scripted = tuple[int, dict[str, str], Any]  # status (0 cuts the connection), headers, body


class Server(ThreadingHTTPServer):
    """Answers each request by the next entry of `script`; the last one again and again.

    What its `dialect` does not take is answered by that, and uses up no entry.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Scripted] = []
        self.dialect: Dialect | None = None
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.delay_s = 0.0
        self.gemini_client: Any = None  # by which of them the tests of Gemini ask
        self.models: list[dict[str, Any]] | None = None  # that the API lists; None: it has no such list
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.times.append(time.monotonic())
            refusal = self.server.dialect.refusal(self.path, self.headers, request) if self.server.dialect else None
            script = self.server.script
            status, headers, body = refusal or (script.pop(0) if len(script) > 1 else script[0])
        if isinstance(body, dict) and body.get("model") == AS_ASKED:
            body = {**body, "model": request["model"]}
        time.sleep(self.server.delay_s)
        self.close_connection = True
        if status == 0:
            return
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def do_GET(self) -> None:
        if self.server.models is None:
            self.send_error(404)
            return
        is_gemini = self.path.startswith("/v1beta/models")
        content = json.dumps({"models" if is_gemini else "data": self.server.models}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()


def gemini_said(text: str, finish: str = "STOP", model: str | None = None, **usage: int) -> Scripted:
    """An answer of Gemini's; `model` is the version that answered, where it is stated."""
    counts = {"promptTokenCount": 1000, "candidatesTokenCount": 100, "totalTokenCount": 1100, **usage}
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish}
    version = {} if model is None else {"modelVersion": model}
    return 200, {}, {"candidates": [candidate], "usageMetadata": counts, **version}


def chat_said(
    text: str | None, finish: str = "stop", cached: int = 0, model: str | None = AS_ASKED, tier: str | None = None,
    **message: Any,
) -> Scripted:  # fmt: skip
    """An answer of the chat protocol's, by `model`, at the service `tier`."""
    said = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    usage |= {"prompt_tokens_details": {"cached_tokens": cached}}  # type: ignore[dict-item]
    choices = [{"index": 0, "message": said, "finish_reason": finish}]
    served = {} if tier is None else {"service_tier": tier}
    return 200, {}, {"model": model, "choices": choices, "usage": usage, **served}


def failed(status: int, message: str = "no", **headers: str) -> Scripted:
    return status, headers, {"error": {"code": status, "message": message}}


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
    takes_no: Mapping[str, tuple[Callable[[Any], bool] | None, Scripted]] = field(default_factory=dict)
    reads: Callable[[Mapping[str, Any]], Scripted | None] = lambda body: None  # what else it finds wrong

    def address(self, server: Server) -> str:
        """What a config calls the endpoint."""
        return server.address + self.path

    def refusal(self, path: str, headers: "Message[str, str]", body: Mapping[str, Any]) -> Scripted | None:
        """The error by which it answers a request; None where it takes it."""
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


def openai_error(message: str, param: str | None, code: str | None) -> Scripted:
    return 400, {}, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def _unsupported_value(name: str) -> tuple[Callable[[Any], bool], Scripted]:
    message = (
        f"Unsupported value: '{name}' does not support 0.0 with this model. Only the default (1) value is supported."
    )
    return (lambda value: value != 1), openai_error(message, name, "unsupported_value")


def _mistral(name: str) -> tuple[None, Scripted]:
    wrong = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 4096}
    said = {"object": "error", "message": {"detail": [wrong]}, "type": "invalid_request_error", "param": None}
    return None, (422, {}, {**said, "code": None})


def _google(message: str) -> dict[str, Any]:
    return {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}


def _no_empty_text(body: Mapping[str, Any]) -> Scripted | None:
    parts = [part for turn in body["contents"] for part in turn["parts"]]
    if all(part.get("text") != "" for part in parts) and all(turn["parts"] for turn in body["contents"]):
        return None
    return 400, {}, _google("Unable to submit request because it has an empty text parameter.")


def _turns_alternate(body: Mapping[str, Any]) -> Scripted | None:
    roles = [message["role"] for message in body["messages"] if message["role"] != "system"]
    if roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None
    message = "After the optional system message, conversation roles must alternate user/assistant/user/assistant/..."
    return 400, {}, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


def _claude(body: Mapping[str, Any]) -> Scripted | None:
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
                None, (400, {}, {"object": "error", "message": _OLD_VLLM, "type": "BadRequestError", "code": 400}),
            )
        }
    ),
    "sglang": Dialect(),
    "litellm": Dialect(
        takes_no={
            "max_completion_tokens": (
                None, (400, {}, {"error": {"message": _LITELLM, "type": "None", "param": None, "code": "400"}}),
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
            name: (None, (400, {}, [_google(f'Invalid JSON payload received. Unknown name "{name}": Cannot find it.')]))
            for name in ("seed", "random_seed")
        },
    ),
    "gemini": Dialect("", ("x-goog-api-key", "k"), "gemini", reads=_no_empty_text),
}  # fmt: skip
