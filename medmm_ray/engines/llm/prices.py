"""What a call to an API costs: a small table, each row with its date, that a config overrides; the most that a request
can cost; and what is to be said of a row that is old, or of a model that is about to end.

A list price holds at the standard tier. An answer is booked at the tier that really served it.
"""

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime

from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.endpoint import ChatReply, ChatRequest

TEMPLATE_TOKENS = 64  # what a chat template adds to the texts
OLD_DAYS = 90  # a price that was looked up longer ago is reported at the start of a run
ENDING_DAYS = 60  # so is a model that is shut down within so many days
PRIORITY = 2.0  # times the list price, at most, by both vendors' pages; only a project's own default asks for it


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens; `cached_input_price` is that of prompt tokens that the provider had cached.

    `image_tokens` is the most that a picture counts for whose longest side is at most 1024 pixels,
    `usual_image_tokens` what most count for. `flex` is the share of the list price that the flex tier costs; 1 where
    none is listed_price.
    """

    input_price: float
    cached_input_price: float
    output_price: float
    image_tokens: int = 2064
    usual_image_tokens: int = 258
    flex: float = 1.0

    def at_tier(self, tier: str | None) -> "Price":
        """The price at the tier that served a request; an unknown one, or None, is the list price."""
        share = {"flex": self.flex, "batch": self.flex, "priority": PRIORITY}.get((tier or "").lower(), 1.0)
        if share == 1.0:
            return self
        return replace(
            self,
            input_price=self.input_price * share,
            cached_input_price=self.cached_input_price * share,
            output_price=self.output_price * share,
        )

    def cost(self, reply: ChatReply) -> float:
        """US dollars of an answer, at the tier that served it; reasoning tokens are among the completion tokens."""
        price = self.at_tier(reply.tier)
        uncached_tokens = reply.prompt_tokens - reply.cached_tokens
        return (
            uncached_tokens * price.input_price
            + reply.cached_tokens * price.cached_input_price
            + reply.completion_tokens * price.output_price
        ) / 1e6

    def max_cost(self, request: ChatRequest) -> float:
        """US dollars that an answer cannot exceed: no token is shorter than a byte, none of them was cached.

        A request for the flex tier may be served, and billed, at the standard one.
        """
        prompt_tokens = request.text_bytes + TEMPLATE_TOKENS + len(request.images) * self.image_tokens
        completion_tokens = request.n * request.max_tokens
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


FREE = Price(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class PriceEntry:
    """A row of the table: the `price` as its source had it on the day `read_on`, and from which day on it is `later`.

    `ends`: the day on which the vendor shuts the model down; `successor`: what the vendor names in its place.
    """

    price: Price
    read_on: date
    later: tuple[date, Price] | None = None
    ends: date | None = None
    successor: str | None = None

    def on(self, day: date) -> Price:
        """The price on a day."""
        if self.later is None:
            return self.price
        start, later_price = self.later
        return later_price if day >= start else self.price


GEMINI_PAGE = "https://ai.google.dev/gemini-api/docs/pricing"
OPENAI_PAGE = "https://developers.openai.com/api/docs/pricing"


def _gemini(
    input_price: float, cached_input_price: float, output_price: float, usual_image_tokens: int = 1120
) -> Price:
    """Google bills the flex and batch tiers at a half (ai.google.dev/gemini-api/docs/flex-inference).

    Gemini 3 reads a picture as 1,120 tokens by default (its model pages), Gemini 2 in tiles of 258.
    """
    return Price(input_price, cached_input_price, output_price, usual_image_tokens=usual_image_tokens, flex=0.5)


def _gpt(input_price: float, cached_input_price: float, output_price: float, image_tokens: int = 2064) -> Price:
    """OpenAI bills the flex tier at the rates of its batch API, a half (its guide to flex processing)."""
    return Price(
        input_price, cached_input_price, output_price, image_tokens=image_tokens, usual_image_tokens=765, flex=0.5
    )


# List prices, prompts up to 200k tokens (Gemini) and 272k (GPT-6). Gemini: Google's price page as transcribed on
# 2026-10-07; the cached rates and the end of the promotion as LiteLLM's price map of September had them (the cached
# rate after it is taken to double too). GPT-6: OpenAI's price page by its readers' release notes of the given days;
# a prompt token is priced at the rate of a cache write, 1.25 times the list's, so that no bill is above it. GPT-4 and
# GPT-5: by readers of the page in May 2026. The ends are those of both vendors' deprecation pages in November 2026.
# None of the pages could be opened on the day this was written: what protects a run is its preflight (jobs.preflight).
_G3, _MAY = date(2026, 10, 7), date(2026, 5, 15)
_END_25, _END_GPT5, _END_GPT4 = date(2026, 12, 1), date(2026, 12, 11), date(2027, 1, 14)
PRICES = {
    "gemini-3.8-flash": PriceEntry(
        _gemini(0.75, 0.075, 3.75), _G3, later=(date(2027, 1, 1), _gemini(1.50, 0.15, 7.50))
    ),
    "gemini-3.5-flash": PriceEntry(_gemini(1.50, 0.15, 9.00), _G3),
    "gemini-3.5-flash-lite": PriceEntry(_gemini(0.30, 0.03, 2.50), _G3),
    "gemini-3.1-flash-lite": PriceEntry(_gemini(0.25, 0.025, 1.50), date(2026, 7, 31), ends=date(2027, 5, 7)),
    "gemini-2.5-flash-lite": PriceEntry(_gemini(0.10, 0.025, 0.40, 258), _G3),
    "gemini-2.5-flash": PriceEntry(
        _gemini(0.30, 0.075, 2.50, 258), _G3, ends=_END_25, successor="gemini-3.5-flash-lite"
    ),
    "gemini-2.5-pro": PriceEntry(_gemini(1.25, 0.31, 10.00, 258), _G3, ends=_END_25, successor="gemini-3.8-flash"),
    "gemini-2.0-flash": PriceEntry(_gemini(0.10, 0.025, 0.40, 258), date(2025, 8, 31), ends=date(2026, 6, 1)),
    "gpt-6-luna": PriceEntry(_gpt(0.125, 0.01, 0.50, 3_779), date(2026, 10, 14)),
    "gpt-6-sol": PriceEntry(_gpt(2.50, 0.20, 10.00), date(2026, 9, 23)),
    "gpt-6.1-terra": PriceEntry(_gpt(1.25, 0.05, 5.00, 2_489), date(2026, 10, 27)),
    "gpt-6.1-sol": PriceEntry(_gpt(2.50, 0.10, 10.00), date(2026, 9, 30)),
    "gpt-4o": PriceEntry(_gpt(2.50, 1.25, 10.00), _MAY, ends=_END_GPT4, successor="gpt-6-luna"),
    "gpt-4o-mini": PriceEntry(  # it counts a picture 33 times
        _gpt(0.15, 0.075, 0.60, 36_835), _MAY, ends=_END_GPT4, successor="gpt-6-luna"
    ),
    "gpt-4.1": PriceEntry(_gpt(2.00, 0.50, 8.00), _MAY, ends=_END_GPT4, successor="gpt-6-luna"),
    "gpt-4.1-mini": PriceEntry(_gpt(0.40, 0.10, 1.60, 2_489), _MAY, ends=_END_GPT4, successor="gpt-6-luna"),
    "gpt-4.1-nano": PriceEntry(_gpt(0.10, 0.025, 0.40, 3_779), _MAY, ends=date(2026, 10, 23)),
    "gpt-5": PriceEntry(_gpt(1.25, 0.125, 10.00), _MAY, ends=_END_GPT5, successor="gpt-6.1-sol"),
    "gpt-5-mini": PriceEntry(_gpt(0.25, 0.025, 2.00, 2_489), _MAY, ends=_END_GPT5, successor="gpt-6.1-terra"),
    "gpt-5-nano": PriceEntry(_gpt(0.05, 0.005, 0.40, 3_779), _MAY, ends=_END_GPT5),
}


def today() -> date:
    """The day by UTC, on which a price is looked up."""
    return datetime.now(UTC).date()


def price_of(
    model: str,
    input_price: float | None = None,
    output_price: float | None = None,
    cached_input_price: float | None = None,
    flex: float | None = None,
    day: date | None = None,
) -> Price:
    """A model's price on a day (None: today): the table's, with what is given in its place.

    An `input_price` without `cached_input_price` prices cached tokens like the others; `flex` is the share of the price
    that the flex tier costs. Raises `ConfigError` where neither the table nor what is given knows a rate.
    """
    listed = PRICES.get(model)
    if listed is None and (input_price is None or output_price is None):
        raise ConfigError(
            f"no price is known for {model!r} (known: {', '.join(PRICES)}); set "
            f"apis.{model}.input_price and apis.{model}.output_price, US "
            "dollars per million tokens (0 for a server of your own)"
        )
    listed_price = listed.on(day or today()) if listed else FREE
    if cached_input_price is None:
        cached_input_price = listed_price.cached_input_price if input_price is None else input_price
    return replace(
        listed_price,
        input_price=listed_price.input_price if input_price is None else input_price,
        cached_input_price=cached_input_price,
        output_price=listed_price.output_price if output_price is None else output_price,
        flex=listed_price.flex if flex is None else flex,
    )


def price_warnings(
    model: str, input_price: float | None = None, output_price: float | None = None, day: date | None = None
) -> list[str]:
    """Warnings, before a run, about a model's row in the table: an old price, a shutdown that is near or past.

    A price that a config gives (`input_price` and `output_price`) does not age.
    """
    listed, now = PRICES.get(model), day or today()
    if listed is None:
        return []
    notes = []
    age = (now - listed.read_on).days
    if age > OLD_DAYS and (input_price is None or output_price is None):
        page = GEMINI_PAGE if model.startswith("gemini") else OPENAI_PAGE
        notes.append(
            f"the price of {model} was read on {listed.read_on}, {age} days ago: compare it with {page} and set "
            "input_price, cached_input_price and output_price where it changed"
        )
    if listed.ends and (listed.ends - now).days <= ENDING_DAYS:
        past = "was" if now >= listed.ends else "is to be"
        instead = f" (its vendor names {listed.successor} in its place)" if listed.successor else ""
        notes.append(
            f"{model} {past} shut down on {listed.ends}, and may be answered by another model at another price{instead}"
        )
    return notes
