"""What the service is attacked with: families of requests that no client of good will sends.

Enters: the service's OpenAPI page and its keys. Leaves: `Attack`s. Each text that may not be in a log holds `MARK`.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.benches.attack_files import files
from jobs.benches.attack_wire import Attack, json_request, request_bytes
from medmm_ray.service import examples
from medmm_ray.service.guard import OPEN_PATHS

Family = Literal["drawn", "images", "sizes", "keys", "texts", "json", "framing", "methods", "paths"]
MARK = "zqmarkzq"
"""A word of no language, to be found in no log."""
_EXAMPLES: Mapping[str, Any] = {
    "/v1/rerank": examples.RERANK["steps"],
    "/v1/score": examples.SCORE["steps"],
    "/v1/rewards": examples.REWARDS["completions"],
    "/v1/tile_maps": examples.TILE_MAPS["image"],
    "/v1/best_of_n": examples.BEST_OF_N["rounds"],
}
BODIES: Mapping[str, Mapping[str, Any]] = {path: example["value"] for path, example in _EXAMPLES.items()}
"""A body that each path takes."""
CLOSED_GETS = ("/v1/models", "/v1/models/m", "/metrics", "/v1/nothing", "/", "/v1/rerank")
METHODS = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "post", "X" * 300)
MEBI = 1 << 20


@dataclass(frozen=True)
class Keys:
    """A key that may ask for everything, one that may read metrics alone, and those that are not taken any more."""

    good: str
    metrics: str
    revoked: str
    expired: str


def drawn(page: Mapping[str, Any], key: str, number: int) -> Iterator[Attack]:
    """Requests drawn from the OpenAPI page: `number` of each operation that keep to it, and as many that do not."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    quiet = settings(
        max_examples=number,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    cases: list[schemathesis.Case[Any]] = []

    def keep(case: "schemathesis.Case[Any]") -> None:
        """Hypothesis looks into the function that it calls, which a list's own method does not allow."""
        cases.append(case)

    for result in schemathesis.openapi.from_dict(dict(page)).get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # the page is ours, and sound
        for mode in schemathesis.GenerationMode:
            # Of an operation without a parameter nothing can be drawn that does not keep to it.
            if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
                continue
            quiet(given(operation.as_strategy(generation_mode=mode))(keep))()  # type: ignore[no-untyped-call]
    for place, case in enumerate(cases):
        arguments = {**case.as_transport_kwargs(base_url="http://127.0.0.1"), "cookies": None}
        prepared = requests.Request(**arguments).prepare()
        content: Any = prepared.body
        body: bytes | None = content.encode() if isinstance(content, str) else content
        target = str(prepared.path_url)
        kind = str(prepared.headers.get("Content-Type", "application/json"))
        data = request_bytes(str(prepared.method), target, body, key, Content_Type=kind)
        yield Attack("drawn from the page", f"{place} {case.method} {case.path}", [data], num_with_key=1)


def images(key: str, seed: int) -> Iterator[Attack]:
    """Every file in every image field."""
    for name, content in files(seed):
        text = base64.b64encode(content).decode()
        for path, changes in (
            ("/v1/rerank", {"image": text}),
            ("/v1/tile_maps", {"image": text}),
            ("/v1/score", {"image": examples.IMAGE, "reference_images": [text]}),
        ):
            data = json_request(path, {**BODIES[path], **changes}, key)
            yield Attack("image files", f"{name} {path}", [data], num_with_key=1)
    for name, text in (
        ("no base64", "%%%" + MARK),
        ("base64 with line breaks", base64.encodebytes(base64.b64decode(examples.IMAGE)).decode()),
        ("base64 with a space behind each letter", "A " * 2_500_000),
        ("a URL", f"http://127.0.0.1:1/{MARK}.png"),
        ("a file", f"file:///etc/{MARK}"),
        ("a data URL of HTML", "data:text/html;base64,PGgxPg=="),
        ("a data URL without its comma", "data:image/png;base64"),
        ("letters of another script", "аbсd" * 9),
    ):
        data = json_request("/v1/rerank", {**BODIES["/v1/rerank"], "image": text}, key)
        yield Attack("image files", name, [data], num_with_key=1)


def sizes(key: str, max_body_mb: int) -> Iterator[Attack]:
    """Bodies that are too large, or would be when they are unpacked."""
    over = (max_body_mb + 1) * MEBI
    head = request_bytes("POST", "/v1/rerank", b"", key, Content_Length=str(over))
    yield Attack("sizes", "longer than allowed", [head, *([b" " * MEBI] * (max_body_mb + 1))], num_with_key=1)
    chunked = request_bytes("POST", "/v1/rerank", None, key, Transfer_Encoding="chunked")
    chunk = b"%x\r\n" % MEBI + b" " * MEBI + b"\r\n"
    yield Attack("sizes", "longer than allowed, chunked", [chunked, *([chunk] * (max_body_mb + 1))], num_with_key=1)
    yield Attack("sizes", "longer than allowed, without a key", [request_bytes("POST", "/v1/rerank", b" " * 8 * MEBI)])
    huge = request_bytes("POST", "/v1/rerank", b"{}", key, Content_Length="9" * 30)
    yield Attack("sizes", "a length beyond all numbers", [huge], num_with_key=1, waits=True, pause_s=2.0)
    zeros = b"0" * (40 * MEBI)
    deflate = zlib.compress(zeros)
    packed = {"gzip": gzip.compress(zeros), "deflate": deflate, "br": deflate, "gzip, gzip": gzip.compress(deflate)}
    for encoding, body in packed.items():
        for path in BODIES:
            data = request_bytes("POST", path, body, key, Content_Encoding=encoding)
            yield Attack("sizes", f"40 MiB as {encoding} {path}", [data], num_with_key=1)
    for path in BODIES:
        for name, body in (
            ("empty lists", b"[" + b"[]," * (5 * MEBI // 3) + b"[]]"),
            ("one text", b'{"question": "' + b"x" * (5 * MEBI) + b'"}'),
            ("escaped quotes", b'{"question": "' + b'\\"' * (5 * MEBI // 2) + b'"}'),
            ("one number", b'{"question": ' + b"9" * (5 * MEBI) + b"}"),
            ("names", json.dumps({f"{MARK}{i}": i for i in range(300_000)}).encode()),
            ("solutions", json.dumps({**BODIES[path], "solutions": ["x"] * 90_000}).encode()),
        ):
            yield Attack("sizes", f"5 MB of {name} {path}", [request_bytes("POST", path, body, key)], num_with_key=1)


def slow(key: str, num_senders: int, seconds: float) -> Iterator[Attack]:
    """Senders that stop within the headers, or within the body, or send it a byte at a time."""
    whole = json_request("/v1/rerank", BODIES["/v1/rerank"], key)
    for number in range(num_senders):
        yield Attack(
            "slow", f"headers {number}", [b"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nX-A"], 0, seconds, waits=True
        )
        yield Attack("slow", f"body {number}", [whole[:-300]], 1, seconds, waits=True)
    for number in range(4):
        pieces = [whole[:-20], *(whole[place : place + 1] for place in range(len(whole) - 20, len(whole)))]
        yield Attack("slow", f"a byte at a time {number}", pieces, 1, pause_s=0.05)


def keys(page: Mapping[str, Any], keys: Keys) -> Iterator[Attack]:
    """Every path without a key, and with each kind of key that is not taken there."""
    wrong: dict[str, dict[str, str]] = {
        "absent": {},
        "revoked": {"Authorization": f"Bearer {keys.revoked}"},
        "expired": {"Authorization": f"Bearer {keys.expired}"},
        "wrong": {"Authorization": f"Bearer {MARK}"},
        "empty": {"Authorization": "Bearer "},
        "no scheme": {"Authorization": keys.good},
        "another scheme": {"Authorization": "Basic " + base64.b64encode(keys.good.encode()).decode()},
        "in quotes": {"Authorization": f'Bearer "{keys.good}"'},
        "a letter less": {"Authorization": f"Bearer {keys.good[:-1]}"},
        "not ASCII": {"Authorization": "Bearer ключ"},
        "60 kB": {"Authorization": "Bearer " + "k" * 60_000},
        "in a cookie": {"Cookie": f"Authorization=Bearer {keys.good}"},
        "in the proxy's header": {"Proxy-Authorization": f"Bearer {keys.good}"},
    }
    requests_of_paths = [("POST", path, json.dumps(body).encode()) for path, body in BODIES.items()]
    requests_of_paths += [("GET", path, b"") for path in CLOSED_GETS]
    for name, headers in wrong.items():
        # An address that shows wrong keys has to wait: each path is tried from one of its own.
        for number, (method, path, body) in enumerate(requests_of_paths):
            data = request_bytes(method, path, body, None, **headers)
            yield Attack("keys", f"{name} {method} {path}", [data], peer=f"127.0.{1 + len(name)}.{1 + number}")
    for path, value in BODIES.items():
        yield Attack("keys", f"another scope {path}", [json_request(path, value, keys.metrics)])
        in_query = request_bytes("POST", f"{path}?key={keys.good}&token={MARK}", json.dumps(value).encode())
        yield Attack("keys", f"in the query {path}", [in_query])
    for path in page["paths"]:
        if path not in OPEN_PATHS:
            yield Attack("keys", f"absent, of the page {path}", [request_bytes("GET", path)])


TEXTS: Mapping[str, str] = {
    "a lone surrogate": f"{MARK} \\ud800 x",
    "surrogates in the wrong order": f"{MARK} \\udc00\\ud800",
    "NUL": f"{MARK} \\u0000 x",
    "controls": f"{MARK} \\u0007\\u001b[31m\\u009b x",
    "right to left": f"{MARK} \\u202e\\u2066 x\\u2069",
    "marks upon a letter": f"{MARK} e" + "\\u0301" * 150_000,
    "a million marks upon a letter": f"{MARK} e" + "\\u0301" * 1_000_000,
    "no character": f"{MARK} \\uffff\\ufffe",
    "white space": "\\u2003\\u00a0\\t\\r\\n",
    "step marks": "Step 1:" * 5000 + MARK,
    "the tag": f"{MARK} ки ки <|end|> <s> [INST]",
    "a format string": f"{MARK} %s %n {{0.__class__}} ${{jndi:ldap://127.0.0.1:1/a}}",
    "markup": f"{MARK} <script>alert(1)</script> ' OR 1=1 --",
    "emoji": f"{MARK} \\ud83d\\udc68\\u200d\\u2695\\ufe0f",
}
"""Contents of a JSON text, escaped."""


def texts(key: str) -> Iterator[Attack]:
    """Odd texts in every field that takes one, and as a name."""
    place = f"{MARK}here"
    for path, body in BODIES.items():
        many = "prompts" if path == "/v1/rewards" else None
        case = dict(body[many][0]) if many else dict(body)
        of_steps = "completions" if many else "solutions"
        variants: dict[str, dict[str, Any]] = {
            "question": {**case, "question": place},
            of_steps: {**case, of_steps: [[place, "So (A)."], place]},
            "documents": {**case, "documents": [place]},
            "options": {**case, "options": [place, "b"]},
            "model": {**case, "model": place},
            "a name": {**case, place: 1},
        }
        for field, variant in variants.items():
            whole = {**body, many: [variant]} if many else variant
            template = json.dumps(whole)
            for name, text in TEXTS.items():
                data = request_bytes("POST", path, template.replace(place, text).encode(), key)
                yield Attack("texts", f"{name} as {field} {path}", [data], num_with_key=1)


def json_bodies(key: str) -> Iterator[Attack]:
    """Bodies that are no JSON, or more than JSON's idea of it."""
    bodies: dict[str, Callable[[str], bytes]] = {
        "lists in lists": lambda _: b"[" * 200_000 + b"]" * 200_000,
        "objects in objects": lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "lists that do not end": lambda _: b"[" * 1_000_000,
        "a text that does not end": lambda _: f'{{"question": "{MARK}'.encode(),
        "NaN": lambda plain: _with(plain, "NaN"),
        "Infinity": lambda plain: _with(plain, "-Infinity"),
        "1e999": lambda plain: _with(plain, "1e999"),
        "5,000 digits": lambda plain: _with(plain, "1" * 5000),
        "-0": lambda plain: _with(plain, "-0"),
        "one name twice": lambda plain: b'{"question": "' + MARK.encode() + b'", ' + plain.encode()[1:],
        "a comma too many": lambda plain: plain.encode()[:-1] + b",}",
        "a comment": lambda plain: b"/* x */" + plain.encode(),
        "two values": lambda plain: plain.encode() * 2,
        "a byte order mark": lambda plain: b"\xef\xbb\xbf" + plain.encode(),
        "UTF-16": lambda plain: plain.encode("utf-16"),
        "UTF-32": lambda plain: plain.encode("utf-32"),
        "bytes that are no UTF-8": lambda plain: plain.encode().replace(b"What", b"\xff\xc0\x80\xed\xa0\x80"),
        "nothing": lambda _: b"",
        "white space": lambda _: b" " * 100_000,
        "null": lambda _: b"null",
        "a list": lambda plain: b"[" + plain.encode() + b"]",
        "a text": lambda plain: json.dumps(plain).encode(),
        "a number": lambda _: b"1e400",
        "zeros": lambda _: b"\0" * 5000,
        "a form": lambda _: b"question=a&solutions=b",
        "XML": lambda _: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        "a prototype": lambda plain: b'{"__proto__": {"x": 1}, "__class__": "os", ' + plain.encode()[1:],
    }
    for path, value in BODIES.items():
        for name, make in bodies.items():
            data = request_bytes("POST", path, make(json.dumps(value)), key)
            yield Attack("JSON", f"{name} {path}", [data], num_with_key=1)
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/xml", "application/json; charset=utf-7"):
        plain = json.dumps(BODIES["/v1/rerank"]).encode()
        data = request_bytes("POST", "/v1/rerank", plain, key, Content_Type=kind)
        yield Attack("JSON", f"sent as {kind}", [data], num_with_key=1)
    for numbers in ("NaN", "Infinity", "1e999", "-1e308", "1e-320", "true", '"1"'):
        for field in ("temperature", "answer_weight", "length_weight"):
            body = f'{{"prompts": [{{"question": "a", "completions": ["b"]}}], "terms": {{"{field}": {numbers}}}}}'
            yield Attack("JSON", f"{field} {numbers}", [request_bytes("POST", "/v1/rewards", body.encode(), key)], 1)


def _with(plain: str, number: str) -> bytes:
    """A body in which a number stands that JSON has not, or that is none of the field's."""
    return (plain[:-1] + f', "num_samples": {number}, "top_n": {number}}}').encode()


def framing(key: str) -> Iterator[Attack]:
    """Requests that two servers would cut apart at different places, and heads that are none."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    post = f"POST /v1/rerank HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n".encode()
    json_type = b"Content-Type: application/json\r\n"
    both = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(hidden))
    heads: dict[str, bytes] = {
        "a length and chunks": both + b"\r\n0\r\n\r\n" + hidden,
        "chunks and a shorter length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n1\r\n \r\n0\r\n\r\n"
        + hidden,
        "two lengths": b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + hidden,
        "two lengths in one header": b"Content-Length: 2, 40\r\n\r\n{}" + hidden,
        "a length with a sign": b"Content-Length: +2\r\n\r\n{}" + hidden,
        "a length below zero": b"Content-Length: -1\r\n\r\n{}" + hidden,
        "a length in hexadecimal": b"Content-Length: 0x2\r\n\r\n{}" + hidden,
        "a length that is no number": b"Content-Length: two\r\n\r\n{}",
        "a folded header": b"X-A: b\r\n c\r\nContent-Length: 2\r\n\r\n{}",
        "a folded length": b"Content-Length:\r\n 2\r\n\r\n{}" + hidden,
        "a space before the colon": b"Content-Length : 2\r\n\r\n{}" + hidden,
        "an encoding that nobody knows": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden,
        "chunks of chunks": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + hidden,
        "identity, then chunks": b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + hidden,
        "a chunk without a size": b"Transfer-Encoding: chunked\r\n\r\n\r\n{}\r\n0\r\n\r\n" + hidden,
        "a chunk of a bad size": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n" + hidden,
        "a chunk below zero": b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n" + hidden,
        "a chunk of 2^64": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n" + hidden,
        "a chunk with a long name": b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * 90_000 + b"\r\n{}\r\n0\r\n\r\n",
        "a chunk that is too long": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}{}\r\n0\r\n\r\n" + hidden,
        "headers behind the chunks": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: x\r\n\r\n"
        + hidden,
        "NUL in a header": b"X-A: a\0b\r\nContent-Length: 2\r\n\r\n{}",
        "a line feed in a header": b"X-A: a\nX-B: b\r\nContent-Length: 2\r\n\r\n{}",
        "a carriage return in a header": b"X-A: a\rX-B: b\r\nContent-Length: 2\r\n\r\n{}",
        "a header without a name": b": b\r\nContent-Length: 2\r\n\r\n{}",
        "a header without a colon": b"X-A\r\nContent-Length: 2\r\n\r\n{}",
        "a header of 300 kB": b"X-A: " + b"a" * 300_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        "10,000 headers": b"X-A: b\r\n" * 10_000 + b"Content-Length: 2\r\n\r\n{}",
        "bytes above 127": b"X-\xff: \xfe\r\nContent-Length: 2\r\n\r\n{}",
        "two keys": b"Authorization: Bearer wrong\r\nContent-Length: 2\r\n\r\n{}",
        "waiting for 100": b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        "another expectation": b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}",
        "an upgrade to HTTP/2": b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
        "a deadline of nan": b"X-Request-Timeout: nan\r\nContent-Length: 2\r\n\r\n{}",
        "a deadline below zero": b"X-Request-Timeout: -1\r\nContent-Length: 2\r\n\r\n{}",
        "a deadline of 1e-9": b"X-Request-Timeout: 1e-9\r\nContent-Length: 2\r\n\r\n{}",
        "an id of two lines": b"X-Request-Id: a%0d%0ab\r\nContent-Length: 2\r\n\r\n{}",
        "a trace that is none": b"traceparent: 00-zz-1\r\ntracestate: "
        + b"a" * 9000
        + b"\r\nContent-Length: 2\r\n\r\n{}",
    }
    for name, head in heads.items():
        # Whoever waits for more of it may close the connection instead of answering.
        # No request of these may be answered with content: the first has an empty body, the hidden one no key.
        data = post + json_type + head
        yield Attack("framing", name, [data], pause_s=2.0, waits=True)
    lines: dict[str, bytes] = {
        "HTTP/0.9": b"GET /v1/models\r\n\r\n",
        "HTTP/1.0": b"GET /v1/models HTTP/1.0\r\n\r\n",
        "HTTP/9.9": b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n",
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "line feeds alone": b"GET /v1/models HTTP/1.1\nHost: a\n\n",
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
        "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        "noise": bytes(range(256)) * 20,
        "nothing but line breaks": b"\r\n" * 5000,
        "a line of 300 kB": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        "many at once": hidden * 50,
        "a web socket": b"GET /v1/rerank HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    }
    for name, line in lines.items():
        yield Attack("framing", name, [line], pause_s=2.0, waits=True)


def methods(key: str) -> Iterator[Attack]:
    """Every path with every method that it does not have, with and without a key."""
    for method in METHODS:
        for path in (*BODIES, *CLOSED_GETS, "/health", "/ready", "/docs"):
            is_open = path in OPEN_PATHS
            data = request_bytes(method, path, b"{}" if method != "TRACE" else None, key)
            yield Attack("methods", f"{method[:9]} {path}", [data], num_with_key=1)
            if not is_open and method in ("HEAD", "OPTIONS", "TRACE"):
                yield Attack("methods", f"{method} {path}, without a key", [request_bytes(method, path)])


def paths(key: str) -> Iterator[Attack]:
    """Targets that lead elsewhere in some servers, and hosts that are not ours."""
    targets = (
        "/../../etc/passwd", "/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/..%5c..%5cwindows", "//v1/models", "/v1//models",
        "/v1/models/", "/V1/MODELS", "/v1/models%00", "/v1/models;x=1", "/v1/models/%ff%fe", "/health/../v1/models",
        "/health%2f..%2fv1%2fmodels", "/health/..;/v1/models", "/health?/../v1/models", "/demo/../v1/models",
        "/demo/%2e%2e/app.py", "/docs/../metrics", "/./metrics", "/metrics/.", "/-/routes", "/-/healthz",
        "http://127.0.0.1/v1/models", "http://example.org/v1/models", "*", "/v1/models#x",
        "/v1/models?" + "a=b&" * 9000,
        "/" + "a/" * 5000, "/v1/models/" + "%41" * 5000, f"/v1/models/{MARK}", f"/nothing?question={MARK}",
    )  # fmt: skip
    for target in targets:
        # Ray's own pages of its proxy hold its routes and no data.
        of_ray = target.startswith("/-/")
        asks_health = target.startswith("/health?")
        yield Attack("paths", f"{target[:60]}", [request_bytes("GET", target)], int(of_ray or asks_health))
        yield Attack("paths", f"{target[:60]}, with a key", [request_bytes("GET", target, None, key)], 1)
    hosts = ("example.org", "", "127.0.0.1:99999", "[::1", "a b", "127.0.0.1@example.org", "\u0430.org", "a" * 5000)
    for host in hosts:
        yield Attack("paths", f"host {host[:30]!r}", [request_bytes("GET", "/v1/models", Host=host)])
        for header in ("X-Forwarded-Host", "X-Forwarded-For", "Forwarded", "X-Original-URL", "X-Rewrite-URL"):
            data = request_bytes("GET", "/metrics", None, None, **{header: host or "/health"})
            yield Attack("paths", f"{header} {host[:30]!r}", [data])


def attacks_of(
    family: Family, page: Mapping[str, Any], known: Keys, drawn_cases: int, max_body_mb: int, seed: int
) -> Iterator[Attack]:
    """The attacks of a family."""
    if family == "drawn":
        return drawn(page, known.good, drawn_cases)
    if family == "images":
        return images(known.good, seed)
    if family == "sizes":
        return sizes(known.good, max_body_mb)
    if family == "keys":
        return keys(page, known)
    plain = {"texts": texts, "json": json_bodies, "framing": framing, "methods": methods, "paths": paths}
    return plain[family](known.good)
