"""What a call to an API costs: a small dated table that a config overrides, and the most that a request can cost."""

from dataclasses import dataclass

from medmm_ray.config import ConfigError
from medmm_ray.engines.endpoint import Reply, Request

TEMPLATE_TOKENS = 64  # what a chat template adds to the texts


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens; `cached` is the rate of prompt tokens that the provider had cached.

    `image_tokens` is the most that a picture counts for whose longest side is at most 1024 pixels.
    """

    read: float
    cached: float
    written: float
    image_tokens: int = 2064

    def of(self, reply: Reply) -> float:
        """US dollars of an answer; thoughts are among the tokens written."""
        fresh = reply.read - reply.cached
        return (fresh * self.read + reply.cached * self.cached + reply.written * self.written) / 1e6

    def most(self, request: Request) -> float:
        """US dollars that an answer cannot exceed: no token is shorter than a byte, none of them was cached."""
        read = request.text_bytes + TEMPLATE_TOKENS + len(request.pictures) * self.image_tokens
        return (read * self.read + request.n * request.max_tokens * self.written) / 1e6


FREE = Price(0.0, 0.0, 0.0)

# List prices, as known in August 2025 (Gemini: prompts up to 200k tokens).
PRICES = {
    "gemini-2.0-flash": Price(0.10, 0.025, 0.40),
    "gemini-2.5-flash-lite": Price(0.10, 0.025, 0.40),
    "gemini-2.5-flash": Price(0.30, 0.075, 2.50),
    "gemini-2.5-pro": Price(1.25, 0.31, 10.00),
    "gpt-4o": Price(2.50, 1.25, 10.00),
    "gpt-4o-mini": Price(0.15, 0.075, 0.60, image_tokens=36_835),  # it counts a picture 33 times
    "gpt-4.1": Price(2.00, 0.50, 8.00),
    "gpt-4.1-mini": Price(0.40, 0.10, 1.60, image_tokens=2_489),
    "gpt-4.1-nano": Price(0.10, 0.025, 0.40, image_tokens=3_779),
    "gpt-5": Price(1.25, 0.125, 10.00),
    "gpt-5-mini": Price(0.25, 0.025, 2.00, image_tokens=2_489),
    "gpt-5-nano": Price(0.05, 0.005, 0.40, image_tokens=3_779),
}


def price_of(model: str, read: float | None = None, written: float | None = None, cached: float | None = None) -> Price:
    """A model's price: the table's, with what is given in its place; `ConfigError` where neither knows it.

    A `read` without `cached` prices cached tokens like the others.
    """
    known = PRICES.get(model)
    if known is None and (read is None or written is None):
        raise ConfigError(
            f"no price is known for {model!r} (known: {', '.join(PRICES)}); set price_read and price_written, US "
            "dollars per million tokens (0 for a server of your own)"
        )
    known = known or FREE
    if cached is None:
        cached = known.cached if read is None else read
    return Price(
        known.read if read is None else read, cached, known.written if written is None else written, known.image_tokens
    )
