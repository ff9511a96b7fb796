"""Gemini by google-generativeai: one attempt at one request, texts and pictures in, its text and token counts out.

The package is imported in the constructor; the key comes from an environment variable. Its REST transport is
synchronous, so that requests run in threads, at most `in_flight` at a time; its own retries are off.
"""

import asyncio
import enum
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from medmm_ray.engines.endpoint import (
    Choice,
    EndpointError,
    Picture,
    Reply,
    Request,
    RetryableError,
    asked_wait_s,
    counted,
    fault_of,
    stated,
)

REFUSED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "LANGUAGE")


class GeminiEndpoint:
    """One model; `address` is another one of the API, e.g. a proxy."""

    def __init__(
        self, model: str, *, address: str | None = None, key_variable: str = "GEMINI_API_KEY",
        timeout_s: float = 120.0, in_flight: int = 16,
    ) -> None:  # fmt: skip
        key = os.environ.get(key_variable)
        if not key:
            raise EndpointError(f"{model} needs a Gemini key in the environment variable {key_variable}; it is not set")
        try:
            import google.generativeai as client
        except ImportError as error:
            raise EndpointError(
                "the package google-generativeai is missing; pip install 'medmm-ray[gemini]'"
            ) from error
        client.configure(api_key=key, transport="rest", client_options={"api_endpoint": address} if address else None)
        self.identity = f"gemini:{model}"
        self._library, self._model, self._timeout_s, self._key_variable = client, model, timeout_s, key_variable
        self._models: dict[str, Any] = {}
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="gemini")

    async def send(self, request: Request) -> Reply:
        """One attempt; the faults of `endpoint`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._send, request)

    def _send(self, request: Request) -> Reply:
        from google.api_core import exceptions
        from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
        from requests import RequestException, Timeout

        contents = [{"role": turn.role, "parts": [_part(part) for part in turn.parts]} for turn in request.turns]
        try:
            response = self._under(request.system).generate_content(
                contents,
                generation_config=_how(request),
                request_options={"timeout": self._timeout_s, "retry": None},
            )
        except exceptions.GoogleAPICallError as error:
            answer = error.response
            wait_s = None if answer is None else asked_wait_s(answer.headers.get("Retry-After"), answer.text)
            check = f"{self._key_variable} and the model's name"
            raise fault_of(self._model, int(error.code or 500), said(error), wait_s, check) from None
        except Timeout:
            raise RetryableError(f"no answer within {self._timeout_s:g} s", maybe_paid=True) from None
        except (RequestException, ParseError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}"[:200], maybe_paid=True) from None
        return self._reply(response, request)

    def _under(self, system: str) -> Any:
        """The library's client for a system instruction."""
        if system not in self._models:
            self._models[system] = self._library.GenerativeModel(self._model, system_instruction=system or None)
        return self._models[system]

    def _reply(self, response: Any, request: Request) -> Reply:
        """As a `Reply`; where no prompt's tokens are counted, all that is possible is taken to have been used."""
        used = response.usage_metadata
        counts = used.prompt_token_count > 0
        refusal = None
        if not response.candidates:
            if not response.prompt_feedback.block_reason:
                raise RetryableError("an answer without content", maybe_paid=True)
            refusal = f"{self._model} blocked the prompt ({_name(response.prompt_feedback.block_reason)})"
        for candidate in response.candidates:
            if _name(candidate.finish_reason) in REFUSED:
                refusal = f"{self._model} did not answer ({_name(candidate.finish_reason)})"
        read = used.prompt_token_count if counts else request.text_bytes
        # Thinking models bill their thoughts as output: total less prompt.
        written = max(used.candidates_token_count, used.total_token_count - used.prompt_token_count)
        return Reply(
            choices=tuple(_choice(candidate) for candidate in response.candidates),
            read=read,
            cached=min(read, counted(used.cached_content_token_count, 0)),
            written=counted(written if counts else None, request.n * request.max_tokens),
            refusal=refusal,
            model=stated(response.model_version),
        )


def _part(part: str | Picture) -> str | dict[str, Any]:
    return part if isinstance(part, str) else {"mime_type": "image/png", "data": part.png}


def _choice(candidate: Any) -> Choice:
    text = "".join(part.text for part in candidate.content.parts)
    return Choice(text, "length" if _name(candidate.finish_reason) == "MAX_TOKENS" else "stop")


def _name(reason: Any) -> str:
    """A reason's name; one that is newer than the library comes as its number."""
    return reason.name if isinstance(reason, enum.Enum) else str(reason)


def _how(request: Request) -> dict[str, Any]:
    how: dict[str, Any] = {"max_output_tokens": request.max_tokens, "candidate_count": request.n}
    if request.temperature is not None:
        how |= {"temperature": request.temperature, "top_p": request.top_p}
    if request.schema is not None:
        how |= {"response_mime_type": "application/json", "response_schema": gemini_schema(request.schema)}
    return how


_KEPT = ("type", "enum", "required", "description", "minItems", "maxItems")


def gemini_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema in the subset, and the spelling, that this API takes."""
    names = {"minItems": "min_items", "maxItems": "max_items"}
    made = {names.get(name, name): value for name, value in schema.items() if name in _KEPT}
    made["type"] = str(schema["type"]).upper()
    if "items" in schema:
        made["items"] = gemini_schema(schema["items"])
    if "properties" in schema:
        made["properties"] = {name: gemini_schema(inner) for name, inner in schema["properties"].items()}
    return made


def said(error: Any) -> str:
    """The server's own words: the library puts ``POST address: `` before them."""
    words = str(error.message)
    return words.partition(": ")[2] if words.startswith("POST ") else words
