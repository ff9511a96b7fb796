"""What an endpoint is: a model, behind an API or in this process, that makes one attempt at one request.

Enters: a `ChatRequest`, texts and images. Leaves: a `ChatReply` with its token counts, or a typed fault:
`RetryableError` (transient: a time-out, a cut connection, a garbled body), `RowError` (that row's error),
`EndpointError` (key, model, quota, missing package: no request can succeed); `faults` says which of them a server's
error is. Retries, limits and money are `client`'s.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from PIL import Image

from medmm_ray.config import ConfigError
from medmm_ray.text import well_formed

MOST_TOKENS = 10**9  # that a server can have counted in one answer


class EndpointError(ConfigError):
    """No request can succeed (key, model, quota, missing package); the message says what to do."""


class RetryableError(Exception):
    """A transient fault.

    `billed` has the tokens that the server counted for it. `maybe_paid`: it counted none, and the model may have worked
    on it, so that it may be billed at any cost.
    """

    def __init__(
        self,
        message: str,
        retry_after_s: float | None = None,
        maybe_paid: bool = False,
        billed: "ChatReply | None" = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_s, self.maybe_paid, self.billed = retry_after_s, maybe_paid, billed


class ChatImage:
    """An opened RGB image, encoded once for all requests that carry it; its longest side at most `max_side` pixels."""

    def __init__(self, image: Image.Image, max_side: int = 1024) -> None:
        if max(image.size) > max_side:
            image = image.copy()
            image.thumbnail((max_side, max_side))
        self.image = image
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        self.png = buffer.getvalue()
        # Of the pixels: PNG bytes depend on the version of the library that wrote them.
        self.sha = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()

    @cached_property
    def base64_png(self) -> str:
        """The PNG file in base 64."""
        return base64.b64encode(self.png).decode()

    @property
    def data_url(self) -> str:
        """The PNG file as a data URL."""
        return f"data:image/png;base64,{self.base64_png}"


@dataclass(frozen=True)
class Turn:
    """One message of a chat: texts and images, in their order; `role` is user or model."""

    role: str
    parts: tuple[str | ChatImage, ...]

    @property
    def texts(self) -> list[str]:
        """The parts that are text."""
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def images(self) -> list[ChatImage]:
        """The parts that are images."""
        return [part for part in self.parts if isinstance(part, ChatImage)]


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model. `n` choices are drawn; None is the model's own temperature, top_p or effort.

    `schema` is a JSON schema; `pattern` a regular expression, which a model in this process obeys. `tier` says how an
    API serves it and at what price, not what is requested: an answer is stored under the same key at any tier.
    """

    system: str
    turns: tuple[Turn, ...]
    schema: Mapping[str, Any] | None = None
    pattern: str | None = None
    max_tokens: int = 4096
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    n: int = 1
    seed: int | None = None
    reasoning_effort: str | None = None
    tier: str | None = None

    @property
    def images(self) -> list[ChatImage]:
        """The images of all turns, in their order."""
        images: list[ChatImage] = []
        for turn in self.turns:
            images += turn.images
        return images

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of all texts and of the schema, in UTF-8."""
        texts = [self.system, json.dumps(self.schema) if self.schema else ""]
        for turn in self.turns:
            texts += turn.texts
        return sum(len(text.encode()) for text in texts)

    def key(self, endpoint: str) -> str:
        """A content hash of the request to the endpoint of this identity; its answer is stored under it.

        What is hashed must never change: the stored answers of earlier runs would be requested, and paid, again.
        """
        turns = []
        for turn in self.turns:
            parts = [part if isinstance(part, str) else {"image": part.sha} for part in turn.parts]
            turns.append([turn.role, parts])
        settings = [self.schema, self.pattern, self.max_tokens, self.temperature, self.top_p, self.n, self.seed]
        if self.reasoning_effort is not None:  # answers that were stored before it could be set keep their key
            settings.append(self.reasoning_effort)
        content = json.dumps([endpoint, self.system, turns, settings], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ChatChoice:
    """One answer. `finish` is stop, or length where it was cut at `max_tokens`. Its text is `well_formed`.

    `thoughts` are the characters of thoughts that a server gave beside the text, in a field of their own.
    """

    text: str
    finish: str
    thoughts: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", well_formed(self.text))


@dataclass(frozen=True)
class ChatReply:
    """A whole answer. `prompt_tokens` counts the cached ones too, `completion_tokens` the reasoning too.

    `refusal` says why a model did not answer: that is a whole answer too, and paid for. `model` is who answered and
    `tier` the service tier that served it, as the API states them; None where it does not. All texts are `well_formed`.
    """

    choices: tuple[ChatChoice, ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    refusal: str | None = None
    model: str | None = None
    tier: str | None = None

    def __post_init__(self) -> None:
        for name in ("refusal", "model", "tier"):
            text = getattr(self, name)
            if text is not None:
                object.__setattr__(self, name, well_formed(text))

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.choices[0].text

    @property
    def tokens(self) -> int:
        """All tokens, those of the prompt and those of the answer."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cut_off(self) -> bool:
        """Whether the first answer ended at the longest length that the request allows."""
        return self.choices[0].finish == "length"


class Endpoint(Protocol):
    """`identity` names the model in the keys of its answers: not where it is reached."""

    identity: str

    async def send(self, request: ChatRequest) -> ChatReply:
        """One attempt; raises the faults of this module."""
        ...


def token_count(number: object, most: int) -> int:
    """Tokens as a server counted them; `most`, all that were possible, where it states no such number."""
    return int(number) if isinstance(number, int | float) and 0 <= number <= MOST_TOKENS else most


def stated(name: object) -> str | None:
    """A name (of a model, of a service tier) as a server states it; None where it states none."""
    return name.strip() or None if isinstance(name, str) else None
