"""Answers of a given form: a pydantic model is schema and check of a reply; one that does not fit is asked for again.

Enters: a request and how its reply is read. Leaves: the value that was read, what it cost, who answered. A reply that
does not fit is named to the model, which may answer again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.endpoint import ChatRequest, Turn
from medmm_ray.engines.llm.store import PricedAnswer

MAX_PLACES = 50  # of a text at which JSON is looked for
QUOTED_CHARACTERS = 80  # of a reply in the message of its fault

Value = TypeVar("Value")
Form = TypeVar("Form", bound="AnswerForm")


class ChatClient(Protocol):
    """Who answers a request: `client.Client`, or a model in this process (`local.LocalEndpoint`)."""

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:
        """The answer; raises `RowError` where there is none."""
        ...


class AnswerForm(BaseModel):
    """The fields of an answer: texts, choices (`Literal`), booleans, lists of texts. Further fields are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a blank text")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]

# The words of a schema that APIs take, in the order in which they are sent: requests are stored under their content.
_SCHEMA_WORDS = ("type", "enum", "items", "minItems", "maxItems")


def json_schema(form: type[AnswerForm]) -> dict[str, Any]:
    """The JSON schema of a form, without pydantic's titles."""
    generated = form.model_json_schema()
    properties = {name: _plain(schema) for name, schema in generated["properties"].items()}
    return {
        "type": "object",
        "properties": properties,
        "required": generated["required"],
        "additionalProperties": False,
    }


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    plain = {word: schema[word] for word in _SCHEMA_WORDS if word in schema}
    if "items" in plain:
        plain["items"] = _plain(plain["items"])
    return plain


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, prose around them or not; those within an object are none of their own."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(MAX_PLACES):
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # no JSON; a number of 5,000 digits; 100,000 brackets
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def parse(reply: str, form: type[Form], kind: str) -> Form:
    """The last JSON object of a reply that has a field of the form: a draft may stand before the answer.

    Raises `RowError` of this `kind` where there is none, or it does not fit.
    """
    answer: dict[str, Any] | None = None
    for entry in json_objects(reply):
        if entry.keys() & form.model_fields.keys():
            answer = entry
    if answer is None:
        raise RowError(kind, f"the reply is no JSON object: {reply.strip()[:QUOTED_CHARACTERS]!r}")
    try:
        return form.model_validate(answer)
    except ValidationError as error:
        message = _fault(error, answer, json_schema(form)["properties"])
    raise RowError(kind, message)


def _fault(error: ValidationError, answer: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    """What is wrong with an answer, in words that the model reads: its first field that does not fit, lists last."""
    names = [str(fault["loc"][0]) for fault in error.errors()]
    name = min(names, key=lambda name: properties[name]["type"] == "array")
    value, schema = answer.get(name), properties[name]
    if schema["type"] == "array":
        return f"{name!r} is {str(value)[:QUOTED_CHARACTERS]!r}, not a list of texts"
    if schema["type"] == "boolean":
        return f"{name!r} is {value!r}, not true or false"
    if not isinstance(value, str) or not value.strip():
        return f"{name!r} is {value!r}, not a text"
    return f"{name!r} is {value!r}, not one of {', '.join(schema['enum'])}"


@dataclass(frozen=True)
class Retry:
    """How often a model is asked, and what it is told after a reply that did not fit."""

    tries: int
    instruction: Callable[[RowError], str]
    max_repeated: int | None = None
    """Characters of the reply that are shown to the model again; None: all."""


@dataclass(frozen=True)
class Accepted(Generic[Value]):
    """What was read from a reply, what all tries cost, US dollars, and the model that gave it, as its API names it."""

    value: Value
    cost: float
    model: str | None


async def ask_until_accepted(
    client: ChatClient, request: ChatRequest, group: str, read: Callable[[PricedAnswer], Value], retry: Retry
) -> Accepted[Value]:
    """What `read` makes of the answer; one that it refuses by a `RowError` is asked for again, with the fault named.

    Raises the last fault, or that of the client, with what all tries cost.
    """
    cost = 0.0
    for tries_left in reversed(range(retry.tries)):
        try:
            answer = await client.ask(request, group)
        except RowError as fault:
            raise RowError(fault.kind, fault.message, fault.cost + cost) from None
        cost += answer.cost
        try:
            return Accepted(read(answer), cost, answer.reply.model)
        except RowError as fault:
            misfit = fault
        if tries_left:
            request = corrected(request, answer.reply.text[: retry.max_repeated], retry.instruction(misfit))
    raise RowError(misfit.kind, misfit.message, cost)


def corrected(request: ChatRequest, reply: str, instruction: str) -> ChatRequest:
    """`request` with a reply that did not fit, and what to do about it.

    No API takes an empty turn: after an empty reply the instruction joins what was asked.
    """
    if reply.strip():
        return replace(request, turns=(*request.turns, Turn("model", (reply,)), Turn("user", (instruction,))))
    *earlier, last = request.turns
    return replace(request, turns=(*earlier, replace(last, parts=(*last.parts, instruction))))
