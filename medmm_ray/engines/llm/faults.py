"""What it means when an API does not answer: an HTTP status, or an error inside a 200, as the fault of the protocol.

Enters: what a server sent. Leaves: a `ServerError`, and from it one of the faults of `endpoint`: `RetryableError`
(transient: 408, 409, 429, 5xx), `RowError` refused (content filters, flagged input), prompt_too_long or request (any
other 4xx: that row's error), `EndpointError` (key, model, quota: no request can succeed).
"""

import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.endpoint import EndpointError, RetryableError

# Reasons to end an answer that mean a filter; Google's OpenAI-compatible address gives them as its own API does.
REFUSED = (
    "SAFETY",
    "RECITATION",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "LANGUAGE",
    "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION",
)
SHOWN_CHARACTERS = 300  # characters of what a server said
UPSTREAM_ERROR = 502  # what an error inside a 200 counts as that states no code of its own

# What servers say of a prompt that is longer than the model's context.
_TOO_LONG = (
    "context_length",
    "maximum context length",
    "model's context length",
    "longer than the maximum model length",
    "exceeds the maximum number of tokens",
    "prompt is too long",
    "contextwindowexceeded",  # LiteLLM
)

# What servers say of a text that a filter has stopped: OpenAI, Azure, LiteLLM, OpenRouter, xAI, DeepSeek, DashScope.
_FLAGGED = re.compile(
    r"content_filter|content management policy|content_?policy_?violation|responsibleaipolicyviolation|flagged_input"
    r"|(?:input|prompt|request|content|text)s?\W+(?:\w+\W+){0,3}flagged|requires moderation|blocked by guardrail"
    r"|usage (?:policy|policies|guidelines)|safety system|content exists risk|data_inspection_failed"
    r"|inappropriate content|prohibited_content"
)
_FILTER_STATUSES = (400, 403, 422, 451)  # with which such a filter answers


@dataclass(frozen=True)
class ServerError:
    """An error as a server stated it: its HTTP `status`, or the one that it states inside a 200, and its `words`.

    `sent` is all that it sent, in one line.
    """

    status: int
    words: str
    sent: str
    inside_200: bool = False


def http_error(status: int, content: bytes) -> ServerError:
    """An answer with an HTTP status of 400 or more."""
    sent = " ".join(content.decode(errors="replace").split())
    try:
        stated = _stated(json.loads(content))
    except (ValueError, RecursionError):
        stated = None
    return ServerError(status, _words(stated) or sent, sent)


def error_inside(body: Any, answers: str) -> ServerError | None:
    """The error that a server put into the JSON of a 200, where no `answers` (the name of their list) are beside it."""
    if isinstance(body, dict) and body.get(answers):
        return None
    stated = _stated(body)
    if stated is None:
        return None
    sent = json.dumps(body, ensure_ascii=False)
    return ServerError(status_of(stated), _words(stated) or sent, sent, inside_200=True)


def error_of_choice(error: Any, sent: Any) -> ServerError:
    """The error of a choice that ended by one (OpenRouter: ``finish_reason: error``)."""
    words = _words(error) or "the model's server ended the answer by an error"
    return ServerError(status_of(error), words, json.dumps(sent, ensure_ascii=False), inside_200=True)


def _stated(body: Any) -> Any:
    """The error in a body: OpenAI's, OpenRouter's and Google's ``error``, SGLang's flat one, FastAPI's ``detail``."""
    if isinstance(body, list) and len(body) == 1:  # Google's OpenAI-compatible address
        [body] = body
    if not isinstance(body, dict):
        return None
    if body.get("error"):
        return body["error"]
    if body.get("object") == "error":
        return body
    return {"message": body["detail"], "code": 400} if body.get("detail") else None


def _words(error: Any) -> str:
    """An error's message and, where a gateway passes it on, the provider's own (OpenRouter: ``metadata.raw``)."""
    if not isinstance(error, dict):
        return "" if error is None else " ".join(str(error).split())
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    messages = []
    for message in (error.get("message"), raw):
        if message:
            messages.append(message if isinstance(message, str) else json.dumps(message))
    return " ".join(": ".join(messages).split())


_NAMED_STATUS = (
    (429, ("rate_limit", "ratelimit", "resource_exhausted", "throttl", "too_many")),
    (400, ("invalid_request", "invalid_argument", "bad_request", "badrequest", "content_filter", "context_length")),
    (401, ("authentication", "invalid_api_key", "unauthenticated")),
)


def status_of(error: Any) -> int:
    """The HTTP status that an error inside a 200 stands for, by its number, or else by its name."""
    if not isinstance(error, dict):
        return UPSTREAM_ERROR
    names = []
    for field in ("code", "status", "status_code", "type"):
        value = error.get(field)
        if isinstance(value, int | float | str) and re.fullmatch(r"[45]\d\d", str(value)):
            return int(value)
        names.append(str(value).lower())
    joined_names = "\n".join(names)  # no mark has a line's end
    for status, marks in _NAMED_STATUS:
        if any(mark in joined_names for mark in marks):
            return status
    return UPSTREAM_ERROR


def fault_of(model: str, error: ServerError, wait_s: float | None, check: str) -> Exception:
    """The fault that an error means.

    `wait_s` are the seconds that the server asks to wait (`retry_after_seconds`); `check` names what the user should
    look at where no request can succeed. Inside a 200 the key was good: a 403 is that text's alone.
    """
    status, sent = error.status, error.sent.lower()
    words = error.words[:SHOWN_CHARACTERS]
    message = f"{model} answered {status}: {words}"
    if status in _FILTER_STATUSES and _FLAGGED.search(sent):
        return RowError("refused", f"{model} did not answer (content filter): {words}")
    is_fatal = status in (401, 402, 404) or (status == 403 and not error.inside_200)
    is_bad_key = status == 400 and "api key" in sent  # Google
    if is_fatal or is_bad_key or "insufficient_quota" in sent:  # OpenAI: a 429 that no wait helps
        return EndpointError(f"{message}; check {check}")
    if status in (408, 409, 429) or status >= 500:  # 409: OpenAI's documentation says to, Google's ABORTED is one too
        return RetryableError(f"{status}: {words}", wait_s)
    if any(mark in sent for mark in _TOO_LONG):
        return RowError("prompt_too_long", message)
    return RowError("request", message)


# How servers say that they do not take a field. The provider's own JSON may stand in a gateway's text, so that quotes
# are escaped, once or twice.
_Q = r"[\s\\'\"`({\[]*"
_REFUSALS = [
    re.compile(pattern.replace("Q", _Q), re.IGNORECASE)
    for pattern in (
        r"extra_forbiddenQ\W+locQ\W+(?:bodyQ\W+)?(\w+)",  # pydantic: Mistral, older vLLM
        r"unsupported (?:parameter|value)s?:?Q(\w+)",  # OpenAI
        r"unknown (?:name|field|parameter|argument)s?:?Q(?:parameterQ)?(\w+)",  # Google, OpenAI
        r"unrecognized (?:request )?arguments?(?: supplied)?:?Q(\w+)",  # Azure
        r"(?:does not|do not|don't) support (?:parameters?:?)Q(\w+)",  # LiteLLM
        r"(?:doesn't|don't) support (?:the )?(\w+)(?:=| field)",  # LiteLLM, Bedrock
        r"[\\'\"`](\w+)[\\'\"`]+ is (?:not supported|not permitted|deprecated)",  # Claude
        r"temperature\W+and\W+(top_p)\W+cannot both",  # Claude
        r"this (response_format) type is unavailable",  # DeepSeek
    )
]


def refused_field(error: ServerError, sent: Collection[str]) -> str | None:
    """Which of the fields that were `sent` a server does not take; None where it complains of something else."""
    if error.status not in (400, 422):
        return None
    for pattern in _REFUSALS:
        for match in pattern.finditer(error.sent[:10_000]):
            if match[1] in sent and match[1] not in ("model", "messages"):
                return match[1]
    return None


# google.rpc.RetryInfo in the JSON of an error.
_RETRY_INFO = re.compile(r'"retryDelay"\s*:\s*"(\d{1,9}(?:\.\d+)?)s"')


def retry_after_seconds(retry_after: str | None, body: str) -> float | None:
    """Seconds that a server asks to wait, by its ``Retry-After`` header or Google's RetryInfo; None by neither."""
    by_header = _seconds(retry_after)
    info = _RETRY_INFO.search(body)
    if info is None:
        return by_header
    by_body = float(info[1])
    return by_body if by_header is None else max(by_header, by_body)


def _seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After`` header, seconds or a date, as seconds from now; None where it is absent, or neither."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
