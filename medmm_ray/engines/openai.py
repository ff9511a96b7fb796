"""Any OpenAI-compatible chat endpoint over aiohttp: GPT, a vLLM server, Gemini's compatible address.

One attempt a call; the key comes from an environment variable. Pictures travel as data URLs; a JSON schema as
``response_format``, or, where a server does not know that, as "any JSON object" or not at all (`form`). The openai
package was tried: it took 1.05 ms of processor time a call where this takes .6.
"""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp

from medmm_ray.engines.endpoint import (
    Choice,
    EndpointError,
    Picture,
    Reply,
    Request,
    RetryableError,
    Turn,
    asked_wait_s,
    counted,
    fault_of,
    stated,
)

ADDRESS = "https://api.openai.com/v1"
GEMINI_TIER = "x-gemini-service-tier"  # the header by which Google's addresses, the compatible one too, state it


class OpenAIEndpoint:
    """One model at one address (None: OpenAI's own)."""

    def __init__(
        self, model: str, *, address: str | None = None, key_variable: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0, form: str = "schema",
    ) -> None:  # fmt: skip
        key = os.environ.get(key_variable)
        if not key:
            raise EndpointError(
                f"{model} needs a key in the environment variable {key_variable}; it is not set (any word for a server "
                "without keys)"
            )
        self.identity = f"openai:{model}"
        self._url = f"{(address or ADDRESS).rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._session: aiohttp.ClientSession | None = None
        self._opened: AsyncIterator[aiohttp.ClientSession] | None = None
        self._model, self._timeout_s, self._form, self._key_variable = model, timeout_s, form, key_variable

    async def send(self, request: Request) -> Reply:
        """One attempt; the faults of `endpoint`."""
        body = json.dumps(self._body(request)).encode()
        try:
            session = await self._connected()
            async with session.post(self._url, data=body, headers=self._headers) as answer:
                content = await answer.read()
        except TimeoutError:
            raise RetryableError(f"no answer within {self._timeout_s:g} s", maybe_paid=True) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise EndpointError(f"{self._url} is no address of an API; expected http(s)://host[:port]/path") from None
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            raise RetryableError(f"no connection: {error}") from None
        except aiohttp.ClientError as error:
            raise RetryableError(f"the connection broke: {type(error).__name__} {error}", maybe_paid=True) from None
        if answer.status >= 400:
            check = f"{self._key_variable}, the model's name and its address"
            said = " ".join(content.decode(errors="replace").split())
            wait_s = asked_wait_s(answer.headers.get("Retry-After"), said)
            raise fault_of(self._model, answer.status, said, wait_s, check)
        try:
            reply = reply_of(json.loads(content), request)
            return replace(reply, tier=reply.tier or stated(answer.headers.get(GEMINI_TIER)))
        except (ValueError, RecursionError) as error:  # of json too: 5,000 digits, 100,000 brackets
            raise RetryableError(
                f"a garbled answer of {len(content)} bytes ({answer.content_type}): {error}", maybe_paid=True
            ) from None

    async def _connected(self) -> aiohttp.ClientSession:
        """The connections of this endpoint, kept open between calls in one event loop."""
        if self._session is None or self._session.closed:
            self._opened = self._open()
            self._session = await anext(self._opened)
        return self._session

    async def _open(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session that ends with its event loop, which closes asynchronous generators."""
        connector = aiohttp.TCPConnector(limit=0)  # how many there are is the client's business
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=True) as session:  # proxies
            yield session

    def _body(self, request: Request) -> dict[str, Any]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [*system, *map(message, request.turns)],
            "max_completion_tokens": request.max_tokens,
            "n": request.n,
        }
        if request.temperature is not None:
            body |= {"temperature": request.temperature, "top_p": request.top_p}
        if request.seed is not None:
            body["seed"] = request.seed
        if request.tier is not None:
            body["service_tier"] = request.tier
        if request.schema is not None and self._form == "schema":
            shape = {"name": "answer", "strict": True, "schema": dict(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        elif request.schema is not None and self._form == "object":
            body["response_format"] = {"type": "json_object"}
        return body


def message(turn: Turn) -> dict[str, Any]:
    """A turn as the protocol has it; one that is text alone as plain text."""
    role = {"user": "user", "model": "assistant"}[turn.role]
    if all(isinstance(part, str) for part in turn.parts):
        return {"role": role, "content": "\n".join(map(str, turn.parts))}
    return {"role": role, "content": [_part(part) for part in turn.parts]}


def _part(part: str | Picture) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": part.data_url}}


def reply_of(body: Any, request: Request) -> Reply:
    """A chat completion as a `Reply`; a server that counts no tokens is taken to have used all that is possible.

    Raises `ValueError` where it is no chat completion.
    """
    answered = _entry(body, "the body")
    listed = answered.get("choices")
    if not isinstance(listed, list) or not listed:
        raise ValueError("it has no choices")
    choices, refusal = [], None
    for choice in (_entry(one, "a choice") for one in listed):
        said = _entry(choice.get("message"), "a message")
        if choice.get("finish_reason") == "content_filter":
            refusal = f"{answered.get('model')} did not answer (content filter)"
        elif said.get("refusal"):
            refusal = f"{answered.get('model')} refused: {str(said['refusal'])[:200]}"
        choices.append(
            Choice(_text(said.get("content")), "length" if choice.get("finish_reason") == "length" else "stop")
        )
    usage = _or_empty(answered.get("usage"))
    read = counted(usage.get("prompt_tokens"), request.text_bytes)
    return Reply(
        choices=tuple(choices),
        read=read,
        cached=min(read, counted(_or_empty(usage.get("prompt_tokens_details")).get("cached_tokens"), 0)),
        written=counted(usage.get("completion_tokens"), request.n * request.max_tokens),
        refusal=refusal,
        model=stated(answered.get("model")),
        tier=stated(answered.get("service_tier")),
    )


def _entry(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object")
    return value


def _or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(content: Any) -> str:
    """What a message says: a text, or the texts of a list of parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text", "") for part in parts if isinstance(part, dict)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a message's content is no text")
    return "".join(texts)
