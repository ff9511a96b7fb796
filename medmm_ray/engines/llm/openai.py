"""Any OpenAI-compatible chat endpoint over aiohttp: GPT, Azure, a vLLM server, OpenRouter, Gemini's compatible address.

One attempt a call; the key comes from an environment variable. Pictures travel as data URLs; a JSON schema as
``response_format``, or, where a server does not know that, as "any JSON object" or not at all (`form`). Where a server
refuses the name of a field, which costs nothing, the next of `NAMES` is sent, now and from then on. The openai package
was tried: it took 1.05 ms of processor time a call where this takes .6.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm import gemini
from medmm_ray.engines.llm.endpoint import (
    ChatChoice,
    ChatImage,
    ChatReply,
    ChatRequest,
    EndpointError,
    RetryableError,
    Turn,
    stated,
    token_count,
)
from medmm_ray.engines.llm.faults import (
    REFUSED,
    ServerError,
    error_inside,
    error_of_choice,
    fault_of,
    http_error,
    refused_field,
)
from medmm_ray.engines.llm.http import HttpAnswer, HttpClient, entry, or_empty

log = logging.getLogger(__name__)

ADDRESS = "https://api.openai.com/v1"

# What servers call a field, in the order in which it is tried; None leaves it out.
NAMES: Mapping[str, tuple[str | None, ...]] = {
    "max_tokens": ("max_completion_tokens", "max_tokens"),  # the first alone: GPT that thinks; the second: Mistral
    "seed": ("seed", "random_seed", None),  # the second: Mistral; none: Gemini
}
_ROLES = {"user": "user", "model": "assistant"}
_CUT = ("length", "max_tokens", "model_length")


class OpenAIEndpoint:
    """One model at one address (None: OpenAI's own). `length_field` is the only name of the longest answer."""

    def __init__(
        self,
        model: str,
        *,
        address: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        form: str = "schema",
        length_field: str | None = None,
    ) -> None:
        key = os.environ.get(key_variable)
        if not key:
            raise EndpointError(
                f"{model} needs a key in the environment variable {key_variable}; it is not set (any word for a server "
                "without keys)"
            )
        self.identity = f"openai:{model}"
        self._url = chat_url(address or ADDRESS)
        self._headers = {**key_header(self._url, key), "Content-Type": "application/json"}
        self._http = HttpClient(timeout_s)
        self._model, self._form = model, form
        self._check = f"{key_variable}, the model's name and its address"
        self._names: dict[str, tuple[str | None, ...]] = dict(NAMES)  # those that are left to try
        self._length_field = length_field
        if length_field:
            self._names["max_tokens"] = (length_field,)
        self._takes_top_p_1 = self._keeps_length = True
        self._taken: set[str] = set()  # fields of what was answered

    async def send(self, request: ChatRequest) -> ChatReply:
        """One attempt; the faults of `endpoint`."""
        while True:
            body = self._body(request)
            answer = await self._http.post(self._url, json.dumps(body).encode(), self._headers)
            error = http_error(answer.status, answer.content) if answer.status >= 400 else None
            reply = self._reply(answer, request) if error is None else error
            if isinstance(reply, ChatReply):
                self._taken |= body.keys()
                return reply
            field = refused_field(reply, body.keys() - self._taken)  # else it is this request that is at fault
            if field is None or not self._renamed(field, request, reply):
                raise fault_of(self._model, reply, answer.wait_s, self._check)

    def _reply(self, answer: HttpAnswer, request: ChatRequest) -> ChatReply | ServerError:
        """What a 200 holds; a `ServerError` where that is an error that costs nothing."""
        billed: ChatReply | None = None
        try:
            body = json.loads(answer.content)
            billed = billed_by_fault(body)
            error = error_in(body)
            if error is None:
                reply = reply_of(body, request)
                self._check_length(reply, request)
                return replace(reply, tier=reply.tier or stated(answer.headers.get(gemini.TIER)))
        except (ValueError, RecursionError) as wrong:  # of json too: 5,000 digits, 100,000 brackets
            message = f"a garbled answer of {len(answer.content)} bytes ({answer.content_type}): {wrong}"
            raise RetryableError(message, maybe_paid=billed is None, billed=billed) from None
        if billed is None:
            return error
        fault = fault_of(self._model, error, answer.wait_s, self._check)
        if isinstance(fault, RetryableError):
            fault.billed = billed
        elif isinstance(fault, RowError) and fault.kind == "refused":
            return replace(billed, refusal=fault.message)
        raise fault

    def _renamed(self, field: str, request: ChatRequest, error: ServerError) -> bool:
        """Whether the next body goes without the `field` that the server does not take, or has another name for it.

        Raises `EndpointError` where a setting would have to change, which nothing here may do for the user.
        """
        meaning = next((meaning for meaning, names in NAMES.items() if field in names), None)
        if meaning is not None:
            names = self._names[meaning]
            if field == names[0] and len(names) > 1:
                self._names[meaning] = names[1:]
                log.warning("%s takes no %s; from now on it gets %s", self._model, field, names[1] or "none")
            if field != self._names[meaning][0]:
                return True
        if field == "top_p" and request.top_p == 1.0:
            self._takes_top_p_1 = False  # that is its default
            return True
        if field in _SETTINGS and (meaning is None or self._length_field):
            setting = _SETTINGS[field].format(value=getattr(request, field, None))
            raise EndpointError(f"{self._model} {setting} in the section that names it. It says: {error.words[:200]}")
        return False

    def _check_length(self, reply: ChatReply, request: ChatRequest) -> None:
        """Warn, once, of a server that ignores the longest length."""
        max_tokens = request.n * request.max_tokens
        if reply.completion_tokens > max_tokens and self._keeps_length:
            self._keeps_length = False
            log.warning(
                "%s wrote %s tokens where %s=%d allows %d: its server ignores that name; set length_field",
                self._model,
                reply.completion_tokens,
                self._names["max_tokens"][0],
                request.max_tokens,
                max_tokens,
            )

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """A request in the protocol's JSON."""
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages += map(message, request.turns)
        body: dict[str, Any] = {"model": self._model, "messages": messages}
        renamed = {"max_tokens": request.max_tokens, "seed": request.seed}
        for field, value in renamed.items():
            name = self._names[field][0]
            if name is not None and value is not None:
                body[name] = value
        if request.n > 1:
            body["n"] = request.n
        if request.tier is not None:
            body["service_tier"] = request.tier
        if request.reasoning_effort is not None:
            body["reasoning_effort"] = request.reasoning_effort
        if request.temperature is not None:
            body["temperature"] = request.temperature
        by_default = request.top_p == 1.0 and (request.temperature is None or not self._takes_top_p_1)
        if request.top_p is not None and not by_default:
            body["top_p"] = request.top_p
        if request.schema is not None and self._form == "schema":
            shape = {"name": "answer", "strict": True, "schema": dict(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        elif request.schema is not None and self._form == "object":
            body["response_format"] = {"type": "json_object"}
        return body


# What to do where a model does not take what a section says.
_SETTINGS = {
    "temperature": "takes no temperature={value}; set temperature to null (the model's own)",
    "top_p": "takes no top_p={value}; set top_p to null (the model's own)",
    "reasoning_effort": "takes no reasoning_effort={value}; set another, or null (the model's own)",
    "service_tier": "takes no tier; set tier to null",
    "max_completion_tokens": "takes no such field; set length_field to null or max_tokens",
    "max_tokens": "takes no such field; set length_field to null or max_completion_tokens",
    "response_format": "does not take the JSON schema of its answers; set form to object or text",
}


def chat_url(address: str) -> str:
    """Where an address takes chats; a query (Azure: ``?api-version=…``) stays at the end."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise EndpointError(f"endpoint is {address!r}, no address of an API: {error}") from None
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit(parts._replace(path=f"{path}/chat/completions"))


def key_header(url: str, key: str) -> dict[str, str]:
    """The header that carries the key; Azure has one of its own."""
    parts = urlsplit(url)
    azure = "api-version" in parse_qs(parts.query) or (parts.hostname or "").endswith(".azure.com")
    return {"api-key": key} if azure else {"Authorization": f"Bearer {key}"}


def message(turn: Turn) -> dict[str, Any]:
    """A turn as the protocol has it; one that is text alone as plain text."""
    role = _ROLES[turn.role]
    if not turn.images:
        return {"role": role, "content": "\n".join(turn.texts)}
    return {"role": role, "content": [_part(part) for part in turn.parts]}


def _part(part: str | ChatImage) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": part.data_url}}


def error_in(body: Any) -> ServerError | None:
    """The error that the JSON of a 200 states in place of an answer, or of one of its choices."""
    error = error_inside(body, answers="choices")
    if error is not None or not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        return error
    for choice in body["choices"]:
        if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") in ("error", "abort")):
            return error_of_choice(choice.get("error") or body.get("error"), body)
    return None


def billed_by_fault(body: Any) -> ChatReply | None:
    """The tokens that a server counted although it gave no answer; None where it counted none."""
    usage = or_empty(or_empty(body).get("usage"))
    prompt_tokens = token_count(usage.get("prompt_tokens"), 0)
    completion_tokens = token_count(usage.get("completion_tokens"), 0)
    if not prompt_tokens and not completion_tokens:
        return None
    cached_tokens = min(prompt_tokens, _cached_tokens(usage))
    return ChatReply((), prompt_tokens, cached_tokens, completion_tokens)


def reply_of(body: Any, request: ChatRequest) -> ChatReply:
    """A chat completion as a `ChatReply`; a server that counts no tokens is taken to have used all that is possible.

    Raises `ValueError` where it is no chat completion.
    """
    completion = entry(body, "the body")
    entries = completion.get("choices")
    if not isinstance(entries, list) or not entries:
        raise ValueError("it has no choices")
    answered_by = completion.get("model")
    choices, refusal = [], None
    for value in entries:
        choice = entry(value, "a choice")
        content = entry(choice.get("message"), "a message")
        reason = str(choice.get("finish_reason"))
        if reason.startswith("content_filter") or reason.upper() in REFUSED:
            refusal = f"{answered_by} did not answer ({reason.replace('_', ' ')})"
        elif content.get("refusal"):
            refusal = f"{answered_by} refused: {str(content['refusal'])[:200]}"
        choices.append(_choice(content, reason, request))
    usage = or_empty(completion.get("usage"))
    prompt_tokens = token_count(usage.get("prompt_tokens"), request.text_bytes)
    completion_tokens = token_count(usage.get("completion_tokens"), request.n * request.max_tokens)
    total_tokens = token_count(usage.get("total_tokens"), 0)
    return ChatReply(
        choices=tuple(choices),
        prompt_tokens=prompt_tokens,
        cached_tokens=min(prompt_tokens, _cached_tokens(usage)),
        # Gemini's compatible address leaves its thoughts out of the completion's tokens, not out of the total.
        completion_tokens=max(completion_tokens, total_tokens - prompt_tokens),
        refusal=refusal,
        model=stated(answered_by),
        tier=stated(completion.get("service_tier")),
    )


def _choice(content: dict[str, Any], reason: str, request: ChatRequest) -> ChatChoice:
    """A message's answer, without the thoughts beside or before it.

    A server that looks for the end of the thoughts, where the model thought none, calls its whole answer thoughts. That
    is taken for what it is where JSON was required, the answer ended by itself and all of it is JSON.
    """
    text = _text(content.get("content"))
    reasoning = content.get("reasoning_content") or content.get("reasoning")
    thoughts = reasoning if isinstance(reasoning, str) else ""
    before, end, after = text.rpartition("</think>")
    if end:
        text, thoughts = after.lstrip(), thoughts + before
    elif text.lstrip().startswith("<think>"):
        text, thoughts = "", thoughts + text
    finish = "length" if reason.lower() in _CUT else "stop"
    if not text.strip() and finish == "stop" and request.schema is not None and _is_json(thoughts):
        text, thoughts = thoughts, ""
    return ChatChoice(text, finish, len(thoughts))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _cached_tokens(usage: dict[str, Any]) -> int:
    details = or_empty(usage.get("prompt_tokens_details"))
    return token_count(details.get("cached_tokens"), 0)


def _text(content: Any) -> str:
    """What a message says: a text, or the texts of a list of parts (Mistral's thoughts are parts too)."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") in ("thinking", "reasoning"):
            continue
        text = part.get("text", "")
        if not isinstance(text, str):
            raise ValueError("a message's content is no text")
        texts.append(text)
    return "".join(texts)
