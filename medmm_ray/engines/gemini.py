"""Gemini by google-generativeai: one multi-turn request with texts and images in, its text and token counts out.

The client library is imported in the constructor; the key comes from ``GEMINI_API_KEY``. Requests run in threads, at
most `in_flight` at a time (the library's REST transport is synchronous). Faults of the moment (408, 429, 5xx, cut
connections, time-outs) are tried again with growing, jittered pauses; a key that is refused or a model that does not
exist ends the job; any other refused request is that row's error.
"""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from medmm_ray.config import ConfigError
from medmm_ray.tables import RowError

KEY_VARIABLE = "GEMINI_API_KEY"
LONGEST_PAUSE_S = 60.0
REFUSED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII")

Turn = tuple[str, Sequence[Any]]  # a role, user or model, and its texts and PIL images


class GeminiError(ConfigError):
    """No request can succeed (key, model, missing package); the message says what to do."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens; `cached` is the rate of prompt tokens that the provider had cached."""

    read: float
    cached: float
    written: float


# List prices for prompts up to 200k tokens, as known in August 2025; `JudgeConfig.price_*` overrides them.
PRICES = {
    "gemini-2.0-flash": Price(0.10, 0.025, 0.40),
    "gemini-2.5-flash-lite": Price(0.10, 0.025, 0.40),
    "gemini-2.5-flash": Price(0.30, 0.075, 2.50),
    "gemini-2.5-pro": Price(1.25, 0.31, 10.00),
}
TOKENS_AN_IMAGE = 258  # one tile; larger pictures are cut into several


@dataclass(frozen=True)
class Reply:
    """An answer. `read` counts prompt tokens with the cached ones, `written` all generated ones."""

    text: str
    read: int
    cached: int
    written: int
    attempts: int

    def cost(self, price: Price) -> float:
        """US dollars."""
        fresh = self.read - self.cached
        return (fresh * price.read + self.cached * price.cached + self.written * price.written) / 1e6


class Gemini:
    """A client of one model under one system instruction."""

    def __init__(
        self, model: str, system: str, *, endpoint: str | None = None, in_flight: int = 16, timeout_s: float = 120.0,
        max_attempts: int = 6, pause_s: float = 1.0,
    ) -> None:  # fmt: skip
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise GeminiError(f"the judge needs a Gemini key in the environment variable {KEY_VARIABLE}; it is not set")
        try:
            import google.generativeai as client
        except ImportError as error:
            raise GeminiError("the package google-generativeai is missing; pip install 'medmm-ray[gemini]'") from error
        client.configure(api_key=key, transport="rest", client_options={"api_endpoint": endpoint} if endpoint else None)
        self.model = model
        self._client = client.GenerativeModel(model, system_instruction=system)
        self._timeout_s, self._max_attempts, self._pause_s = timeout_s, max_attempts, pause_s
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="gemini")

    async def ask(self, turns: Sequence[Turn], *, schema: Any = None, max_tokens: int = 4096) -> Reply:
        """The model's answer to `turns` (role user or model, texts and images), greedy; JSON where a schema is given.

        Raises `RowError` of kind judge_refused (safety block), judge_request (a request it does not take) or
        judge_unavailable (all attempts failed), and `GeminiError` where every further request would fail too.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, turns, schema, max_tokens)

    def _ask(self, turns: Sequence[Turn], schema: Any, max_tokens: int) -> Reply:
        from google.api_core import exceptions
        from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
        from requests import RequestException

        how: dict[str, Any] = {"temperature": 0.0, "max_output_tokens": max_tokens}
        if schema is not None:
            how |= {"response_mime_type": "application/json", "response_schema": schema}
        contents = [{"role": role, "parts": list(parts)} for role, parts in turns]
        for attempt in range(1, self._max_attempts + 1):
            asked_for = None
            try:
                # The library's own retry is off: it would hide attempts from us and knows no Retry-After.
                response = self._client.generate_content(
                    contents, generation_config=how, request_options={"timeout": self._timeout_s, "retry": None}
                )
                return self._reply(response, attempt)
            except exceptions.GoogleAPICallError as error:
                self._raise_if_final(error)
                fault, asked_for = f"{error.code}: {said(error)}", retry_after(error.response)
            except (RequestException, ParseError) as error:
                fault = f"{type(error).__name__}: {error}"
            if attempt < self._max_attempts:
                time.sleep(pause(attempt, self._pause_s, random.random(), asked_for))
        raise RowError("judge_unavailable", f"{self.model} failed {self._max_attempts} times, last: {fault[:200]}")

    def _raise_if_final(self, error: Any) -> None:
        code = int(error.code or 500)
        if code in (401, 403, 404) or (code == 400 and "api key" in said(error).lower()):
            raise GeminiError(f"{self.model} answered {code}: {said(error)}; check {KEY_VARIABLE} and judge.model")
        if 400 <= code < 500 and code not in (408, 429):
            raise RowError("judge_request", f"{self.model} answered {code}: {said(error)[:200]}")

    def _reply(self, response: Any, attempts: int) -> Reply:
        if not response.candidates:
            reason = response.prompt_feedback.block_reason.name
            raise RowError("judge_refused", f"{self.model} blocked the prompt ({reason})")
        first = response.candidates[0]
        if first.finish_reason.name in REFUSED:
            raise RowError("judge_refused", f"{self.model} did not answer ({first.finish_reason.name})")
        used = response.usage_metadata
        return Reply(
            text="".join(part.text for part in first.content.parts),
            read=used.prompt_token_count,
            cached=used.cached_content_token_count,
            # Thinking models bill their thoughts as output: total less prompt.
            written=max(used.candidates_token_count, used.total_token_count - used.prompt_token_count),
            attempts=attempts,
        )


def said(error: Any) -> str:
    """The server's own words: the library puts ``POST address: `` before them."""
    message = str(error.message)
    return message.partition(": ")[2] if message.startswith("POST ") else message


def retry_after(response: Any) -> float | None:
    """Seconds that the server asks to wait for (a ``Retry-After`` header in seconds), if it does."""
    value: str = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdigit() else None


def pause(attempt: int, first_s: float, chance: float, asked_for: float | None) -> float:
    """Seconds before the next attempt: doubling, spread by `chance` in [0, 1), never less than the server asks."""
    grown = min(LONGEST_PAUSE_S, first_s * 2.0 ** (attempt - 1)) * (0.5 + chance)
    return max(grown, asked_for or 0.0)
