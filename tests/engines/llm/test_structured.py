"""engines/llm/structured.py: JSON out of prose, schemas as they are sent, and asking again."""

import asyncio
import json
from typing import Literal

import pytest
from pydantic import Field

from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply, ChatRequest, Turn
from medmm_ray.engines.llm.store import PricedAnswer
from medmm_ray.engines.llm.structured import (
    AnswerForm,
    Retry,
    Text,
    ask_until_accepted,
    corrected,
    json_objects,
    json_schema,
    parse,
)

REQUEST = ChatRequest("s", (Turn("user", ("Which?",)),))


class Form(AnswerForm):
    letter: Literal["A", "B"]
    why: Text
    words: list[str] = Field(json_schema_extra={"minItems": 2, "maxItems": 2})
    sure: bool = True


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ('{"a": 1}', [{"a": 1}]),
        ('A draft {"a": 1}, then {broken} and {"b": {"c": 2}}.', [{"a": 1}, {"b": {"c": 2}}]),
        ("none", []),
        ("[1, 2]", []),
        ('{"a": ' + "9" * 5000 + "}", []),
        ("{" * 100_000, []),
    ],
)
def test_json_is_found_in_prose(text: str, objects: list[object]) -> None:
    assert list(json_objects(text)) == objects


def test_a_form_is_its_schema_byte_for_byte() -> None:
    assert json.dumps(json_schema(Form)) == json.dumps(
        {
            "type": "object",
            "properties": {
                "letter": {"type": "string", "enum": ["A", "B"]},
                "why": {"type": "string"},
                "words": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
                "sure": {"type": "boolean"},
            },
            "required": ["letter", "why", "words"],
            "additionalProperties": False,
        }
    )


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"words": "a", "letter": "C"}, "'letter' is 'C', not one of A, B"),
        ({"words": "a", "letter": "A", "why": "  "}, "'why' is '  ', not a text"),
        ({"letter": 3}, "'letter' is 3, not a text"),
        ({"letter": "A", "why": "so", "words": ["a", 1]}, "'words' is \"['a', 1]\", not a list of texts"),
        ({"letter": "A", "why": "so", "words": [], "sure": "yes"}, "'sure' is 'yes', not true or false"),
        ({"other": 1}, "the reply is no JSON object: '{\"other\": 1}'"),
    ],
)
def test_the_first_field_that_does_not_fit_is_named(answer: dict[str, object], fault: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(json.dumps(answer), Form, "some_reply")
    assert str(caught.value) == f"some_reply: {fault}"


def test_the_last_answer_counts_and_further_fields_do_not() -> None:
    answer = {"letter": "A", "why": "so", "words": [], "note": "?"}
    reply = f'At first {{"letter": "C"}}, then {json.dumps(answer)}; see {{"a": 1}}'
    assert parse(reply, Form, "some_reply") == Form(letter="A", why="so", words=[])


class Scripted:
    """Answers one text after the other, each at 0.5 dollars."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.requests = list(texts), list[ChatRequest]()

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:
        assert group == "q"
        self.requests.append(request)
        reply = ChatReply((ChatChoice(self.texts.pop(0), "stop"),), 1, 0, 1, model="m")
        return PricedAnswer(reply, 0.5)


def number(answer: PricedAnswer) -> int:
    if not answer.reply.text.isdigit():
        raise RowError("number_reply", f"{answer.reply.text} is no number")
    return int(answer.reply.text)


def test_a_reply_that_does_not_fit_is_asked_for_again_with_its_fault() -> None:
    client = Scripted("seven", "7")
    retry = Retry(2, lambda fault: f"{fault.message}; again", max_repeated=3)
    accepted = asyncio.run(ask_until_accepted(client, REQUEST, "q", number, retry))
    assert (accepted.value, accepted.cost, accepted.model) == (7, 1.0, "m")
    assert client.requests == [REQUEST, corrected(REQUEST, "sev", "seven is no number; again")]


def test_the_last_fault_has_the_cost_of_all_tries() -> None:
    with pytest.raises(RowError, match="number_reply: b is no number") as caught:
        asyncio.run(ask_until_accepted(Scripted("a", "b"), REQUEST, "q", number, Retry(2, str)))
    assert caught.value.cost == 1.0


def test_after_an_empty_reply_the_instruction_joins_the_question() -> None:
    assert corrected(REQUEST, " ", "Again.").turns == (Turn("user", ("Which?", "Again.")),)
    assert corrected(REQUEST, "x", "Again.").turns == (*REQUEST.turns, Turn("model", ("x",)), Turn("user", ("Again.",)))
