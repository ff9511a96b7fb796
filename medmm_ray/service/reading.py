"""Bodies are parsed off the event loop, and what they hold is counted before anything else looks at it.

Enters: a JSON body. Leaves: its value, or a 413 that names the limit: too many values, too deep, a text too long. So a
body of 5 MB never keeps `/health` waiting, whatever it holds. Values are counted in the bytes first: the parser builds
all of them, a million small ones in one go and without letting another thread run.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

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
    # The standard parser: it stops at a depth of its own, and its errors have a place.
    try:
        value = json.loads(body)
    except RecursionError:
        raise _too_large("the body is nested deeper than", MAX_DEPTH) from None
    except UnicodeDecodeError as error:
        raise Problem(Kind.INVALID, f"body: no UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no longer ones
        raise Problem(Kind.INVALID, f"body: a number of more than {sys.get_int_max_str_digits()} digits") from None
    _count(value, _Counts(), 0, is_text=True)
    return value


def count_values(body: bytes) -> None:
    """Raise a 413 `Problem` where a body has clearly more values, or escaped quotes, than may be sent.

    Reads the bytes outside of texts, where each value but the first follows a comma, a colon or a bracket; of what is
    no JSON it says nothing.
    """
    num_marks = place = 0
    while place < len(body):
        quote = body.find(b'"', place, place + WINDOW)
        stop = min(place + WINDOW, len(body)) if quote < 0 else quote
        for mark in b",:[{":
            num_marks += body.count(mark, place, stop)
        # An object's value has two of them; the exact number is counted in what the parser gives.
        if num_marks > 2 * MAX_VALUES:
            raise _too_large("the body holds more values than", MAX_VALUES)
        place = stop
        if quote < 0:
            continue
        start, num_escaped = quote + 1, 0
        while (end := body.find(b'"', start)) >= 0:
            before = body[start:end]
            start = end + 1
            # An odd number of backslashes before a quote makes it a part of the text.
            if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
                break
            num_escaped += 1
            if num_escaped > MAX_CHARS:
                raise _too_large("a text is longer, in characters, than", MAX_CHARS)
        if end < 0:
            return
        place = start


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
