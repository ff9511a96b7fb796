"""A local HTTP server that answers by a script, for the tests of API clients: their real packages talk to it."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AS_ASKED = "(as asked)"  # of an answer's model: the one that the request names
Scripted = tuple[int, dict[str, str], Any]  # status (0 cuts the connection), headers, body


class Server(ThreadingHTTPServer):
    """Answers each request by the next entry of `script`; the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Scripted] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.delay_s = 0.0
        self.gemini_client: Any = None  # by which of them the tests of Gemini ask
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(asked)
            self.server.times.append(time.monotonic())
            status, headers, body = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if isinstance(body, dict) and body.get("model") == AS_ASKED:
            body = {**body, "model": asked["model"]}
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
