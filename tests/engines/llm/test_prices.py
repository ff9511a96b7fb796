"""engines/llm/prices.py: what an answer costs, on which day and at which tier, and what is told of an old price."""

from datetime import date

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.endpoint import ChatReply, ChatRequest, Turn
from medmm_ray.engines.llm.prices import Price, price_of, price_warnings

DAY = date(2026, 11, 30)
ANSWER = ChatReply((), prompt_tokens=1000, cached_tokens=400, completion_tokens=500)


def test_a_price_is_the_tables_with_what_is_given_in_its_place() -> None:
    listed = price_of("gemini-3.5-flash-lite", day=DAY)
    assert (listed.input_price, listed.cached_input_price, listed.output_price, listed.flex) == (0.30, 0.03, 2.50, 0.5)
    given = price_of("gemini-3.5-flash-lite", output_price=1.0, flex=0.6, day=DAY)
    assert (given.input_price, given.cached_input_price, given.output_price, given.flex) == (0.30, 0.03, 1.0, 0.6)
    assert price_of("new-model", 1.0, 2.0) == Price(1.0, 1.0, 2.0)
    assert price_of("new-model", 1.0, 2.0, 0.5) == Price(1.0, 0.5, 2.0)
    with pytest.raises(ConfigError, match="no price is known for 'new-model'"):
        price_of("new-model", input_price=1.0)


def test_a_promotion_ends_on_its_day() -> None:
    read = [price_of("gemini-3.8-flash", day=date(*day)).input_price for day in ((2026, 12, 31), (2027, 1, 1))]
    assert read == [0.75, 1.50]


def test_cached_tokens_are_priced_and_a_worst_case_is_never_exceeded() -> None:
    price = Price(1.0, 0.25, 2.0, image_tokens=100)
    assert price.cost(ANSWER) == (600 + 100 + 1000) / 1e6
    request = ChatRequest("s", (Turn("user", ("é" * 10,)),), max_tokens=50, n=2)
    assert price.max_cost(request) == (1 + 20 + 64 + 200) / 1e6  # system s, 20 bytes, the template, 2 x 50 x 2


@pytest.mark.parametrize(
    ("served", "share"),
    [("flex", 0.5), ("FLEX", 0.5), ("batch", 0.5), ("default", 1.0), ("standard", 1.0), (None, 1.0), ("priority", 2.0)],
)
def test_an_answer_is_booked_at_the_tier_that_served_it(served: str | None, share: float) -> None:
    price = Price(1.0, 0.25, 2.0, flex=0.5)
    assert price.cost(
        ChatReply((), prompt_tokens=1000, cached_tokens=400, completion_tokens=500, tier=served)
    ) == pytest.approx(share * 1700 / 1e6)
    assert Price(1.0, 0.25, 2.0).cost(ChatReply((), 1000, 400, 500, tier="flex")) == 1700 / 1e6, "no discount is known"


def test_a_request_for_flex_reserves_the_whole_price() -> None:
    """It may be served at the standard tier."""
    price = Price(0.0, 0.0, 2.0, flex=0.5)
    assert price.max_cost(ChatRequest("", (), max_tokens=50, tier="flex")) == 100 / 1e6


def test_a_price_that_was_read_over_90_days_ago_is_told_and_one_that_is_given_is_not() -> None:
    assert price_warnings("gemini-3.5-flash-lite", day=date(2027, 1, 5)) == []
    [told] = price_warnings("gemini-3.5-flash-lite", day=date(2027, 1, 6))
    assert told == (
        "the price of gemini-3.5-flash-lite was read on 2026-10-07, 91 days ago: compare it with "
        "https://ai.google.dev/gemini-api/docs/pricing and set input_price, cached_input_price and "
        "output_price where it changed"
    )
    assert len(price_warnings("gemini-3.5-flash-lite", input_price=0.3, day=date(2027, 1, 6))) == 1
    assert price_warnings("gemini-3.5-flash-lite", input_price=0.3, output_price=2.5, day=date(2027, 1, 6)) == []
    assert price_warnings("a-model-of-mine", day=DAY) == []


@pytest.mark.parametrize(
    ("day", "told"),
    [
        (date(2026, 10, 1), None),
        (date(2026, 10, 2), "gemini-2.5-flash is to be shut down on 2026-12-01"),
        (date(2026, 12, 1), "gemini-2.5-flash was shut down on 2026-12-01"),
    ],
)
def test_a_model_that_ends_is_told_with_its_successor(day: date, told: str | None) -> None:
    notes = [note for note in price_warnings("gemini-2.5-flash", day=day) if "shut down" in note]
    assert [note.partition(",")[0] for note in notes] == ([told] if told else [])
    assert all("(its vendor names gemini-3.5-flash-lite in its place)" in note for note in notes)
