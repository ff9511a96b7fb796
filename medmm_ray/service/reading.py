"""Bodies are parsed off the event loop, and what they hold is counted before anything else looks at it.

Enters: a JSON body. Leaves: its value, or a 413 that names the limit: too many values, too deep, a text too long. So a
body of 5 MB never keeps `/health` waiting, whatever it holds. Values are counted in the bytes first, by NumPy, which
lets other threads run: the parser builds all of them, a million small ones in one go, and lets none.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from medmm_ray.service.problems import Kind, Problem

MAX_VALUES = 100_000
MAX_DEPTH = 16
MAX_CHARS = 200_000
MAX_ALL_CHARS = 2_000_000
NUM_THREADS = 4
"""Bodies and images that are read at a time: each may need hundreds of MB."""
IMAGE_KEYS = ("image", "reference_images")
"""Keys whose texts are files, bounded by the body's size and by their pixels."""


@asynccontextmanager
async def few_threads(_: FastAPI) -> AsyncIterator[None]:
    """The application's lifespan: what `asyncio.to_thread` does has `NUM_THREADS` threads."""
    # Python would take as many as there are cores, and more.
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read")
    asyncio.get_running_loop().set_default_executor(pool)
    yield


WINDOW = 1 << 16
"""Bytes that are counted in one go."""


@dataclass
class _Counts:
    values: int = 0
    chars: int = 0


def parse(body: bytes) -> Any:
    """The value of a JSON body that is within the limits. Raises `json.JSONDecodeError`, or a `Problem` (413)."""
    count_values(body)
    # Eight times as fast as the standard parser, on whose time no other thread runs.
    try:
        value = from_json(body, cache_strings="keys")
    except ValueError:
        value = _parse_strictly(body)
    _count(value, _Counts(), 0, is_text=True)
    return value


def _parse_strictly(body: bytes) -> Any:
    # The standard parser stops at a depth of its own, and its errors have a place.
    try:
        return json.loads(body)
    except RecursionError:
        raise _too_large("the body is nested deeper than", MAX_DEPTH) from None
    except UnicodeDecodeError as error:
        raise Problem(Kind.INVALID, f"body: no UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no longer ones
        raise Problem(Kind.INVALID, f"body: a number of more than {sys.get_int_max_str_digits()} digits") from None


def count_values(body: bytes) -> None:
    """Raise a 413 `Problem` where a body has clearly more values, or escaped characters, than may be sent.

    Reads the bytes outside of texts, where each value but the first of its list or object follows a comma; of what is
    no JSON it says nothing.
    """
    num_commas = num_brackets = num_escaped = 0
    is_in_text, num_backslashes = False, 0  # at the end of the bytes so far
    for start in range(0, len(body), WINDOW):
        if is_in_text and not num_backslashes and not _has_any(body, b'"\\', start, start + WINDOW):
            continue  # the inside of a file
        part = np.frombuffer(body, np.uint8, min(WINDOW, len(body) - start), start)
        is_quote = part == ord('"')
        is_backslash = part == ord("\\")
        if num_backslashes or is_backslash.any():
            places = np.arange(len(part), dtype=np.int32)
            last_other = np.maximum.accumulate(np.where(is_backslash, -1 - num_backslashes, places))
            num_before = np.concatenate(([num_backslashes], places - last_other))
            # An odd number of backslashes before a quote makes it a part of the text.
            is_escaped = num_before[:-1] % 2 == 1
            is_quote &= ~is_escaped
            num_escaped += int(np.count_nonzero(is_escaped))
            num_backslashes = int(num_before[-1])
        is_text = np.logical_xor.accumulate(is_quote) ^ is_in_text
        is_in_text = bool(is_text[-1])
        num_commas += int(np.count_nonzero((part == ord(",")) & ~is_text))
        num_brackets += int(np.count_nonzero(((part == ord("[")) | (part == ord("{"))) & ~is_text))
        if max(num_commas, num_brackets) > MAX_VALUES:
            raise _too_large("the body holds more values than", MAX_VALUES)
        if num_escaped > MAX_ALL_CHARS:
            raise _too_large("the texts of the body have together more escaped characters than", MAX_ALL_CHARS)


def _has_any(body: bytes, marks: bytes, start: int, stop: int) -> bool:
    return any(body.find(mark, start, stop) >= 0 for mark in marks)


def _count(value: Any, counts: _Counts, depth: int, is_text: bool) -> None:
    # Whatever shape the body has: it is not known yet which route's it is.
    counts.values += 1
    if counts.values > MAX_VALUES:
        raise _too_large("the body holds more values than", MAX_VALUES)
    if isinstance(value, str):
        if is_text:
            _count_text(value, counts)
    elif isinstance(value, Mapping | list):
        if depth == MAX_DEPTH:
            raise _too_large("the body is nested deeper than", MAX_DEPTH)
        if isinstance(value, list):
            for item in value:
                _count(item, counts, depth + 1, is_text)
        else:
            for key, item in value.items():
                _count_text(key, counts)
                _count(item, counts, depth + 1, is_text and key not in IMAGE_KEYS)


def _count_text(text: str, counts: _Counts) -> None:
    # A tokenizer needs seconds for a text of megabytes, of which no model reads the end.
    if len(text) > MAX_CHARS:
        raise _too_large(f"a text of {len(text)} characters is longer than", MAX_CHARS)
    counts.chars += len(text)
    if counts.chars > MAX_ALL_CHARS:
        raise _too_large("the texts of the body have together more characters than", MAX_ALL_CHARS)


def _too_large(sentence: str, limit: int) -> Problem:
    return Problem(Kind.TOO_LARGE, f"{sentence} {limit}; send less, or several requests")


class ParsedRequest(Request):
    """A request whose JSON is parsed on another thread."""

    async def json(self) -> Any:
        """The body's value (`parse`)."""
        if not hasattr(self, "_json"):
            self._json = await asyncio.to_thread(parse, await self.body())
        return self._json


class ParsedRoute(APIRoute):
    """A route whose bodies are read by `ParsedRequest`: the `route_class` of a router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given such a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            """Read and answer a request."""
            return await handler(ParsedRequest(request.scope, request.receive))

        return handle
