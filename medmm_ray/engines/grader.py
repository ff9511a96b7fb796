"""Whether answers are right: a letter exactly, other text by its normal form, and open answers by a model's word too.

Enters: a question row with its gold answer, and extracted answers. Leaves: True, False, or None where there is no
answer or nobody could say. Only answers to open questions that differ in their normal form are asked about, each
distinct one of a question once; those on which it gave no verdict are counted. The gold answer is shown to this model
alone: no policy and no judge sees its requests.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from medmm_ray.config import Config
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.access import Access, Apis
from medmm_ray.engines.llm.client import ApiEngine, Client
from medmm_ray.engines.llm.endpoint import ChatRequest, Turn
from medmm_ray.engines.llm.structured import AnswerForm, json_schema, parse
from medmm_ray.estimate import Line, ModelCost, Sizes
from medmm_ray.text import equal_key, is_correct

log = logging.getLogger(__name__)

SYSTEM = (
    "You grade short answers to medical questions. Say whether the given answer means the same as the reference answer "
    "to this question: synonyms, abbreviations and further detail that agrees are the same; another finding, side, "
    "place, amount, or an answer that leaves it open, is not."
)


class SameForm(AnswerForm):
    """Whether two answers mean the same."""

    same: bool


SCHEMA = json_schema(SameForm)
PROMPT_TOKENS, REPLY_TOKENS = 120, 10  # around a question; what the estimate assumes, thoughts left out
RULE = 'Answer with one JSON object and nothing else: {"same": true or false}.'


class GraderEngine(ApiEngine):
    """The model that grades; it is asked in the actors of the step whose answers it grades."""

    model: str
    """Name of the model."""


class EquivalenceConfig(Config):
    """Whether two open answers mean the same."""

    engine: GraderEngine | None = None
    """Model that is asked where the normal forms of two answers differ; null: they are then not the same."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null leaves it to the model (reasoning models take no other)."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer of the model, tokens; thoughts count."""


def equivalence_cost(sizes: Sizes, model: ModelCost) -> Line:
    """The line of grading by a model behind an API, before it runs."""
    calls = sizes.questions * sizes.graded_answers
    input_tokens = calls * (PROMPT_TOKENS + sizes.question_tokens)
    output_tokens = calls * REPLY_TOKENS
    return Line(
        step="equivalence",
        work=f"{sizes.graded_answers:g} answers a question",
        calls=calls,
        tokens=input_tokens + output_tokens,
        dollars=model.dollars(input_tokens, output_tokens),
        notes=(f"equivalence assumes {sizes.graded_answers:g} distinct answers a question to ask about",),
    )


@dataclass(frozen=True)
class Grades:
    """For each answer whether it is `right`; None where there is no answer, or nobody could say.

    The model was `asked` about so many of them, and of those left so many `unanswered`.
    """

    right: list[bool | None]
    asked: int = 0
    unanswered: int = 0


class Grader:
    """Grades the answers to one question at a time; without a client by their form alone."""

    def __init__(self, client: Client | None = None, max_tokens: int = 256, temperature: float | None = 0.0) -> None:
        self.client, self.max_tokens, self.temperature = client, max_tokens, temperature
        self._warned_of_cut = False

    async def grade(self, question: Mapping[str, Any], answers: Sequence[str | None]) -> Grades:
        """The grades of `answers`; `question` is a row with question_id, question and answer."""
        gold, answer_type = question["answer"], question["answer_type"]
        plain = [is_correct(answer, gold, answer_type) for answer in answers]
        if self.client is None or answer_type != "open":
            return Grades(plain)
        # Answers of one normal form are one question to the model, in an order that does not depend on the samples'.
        open_answers: dict[str, str] = {}
        for answer, is_right in zip(answers, plain, strict=True):
            if answer and is_right is False:
                open_answers[equal_key(answer)] = answer
        keys = sorted(open_answers)
        verdicts = await asyncio.gather(*(self._is_same(question, open_answers[key]) for key in keys))
        verdict_of_key = dict(zip(keys, verdicts, strict=True))
        right: list[bool | None] = []
        for answer, is_right in zip(answers, plain, strict=True):
            right.append(verdict_of_key[equal_key(answer)] if answer and is_right is False else is_right)
        return Grades(right, asked=len(verdicts), unanswered=verdicts.count(None))

    async def _is_same(self, question: Mapping[str, Any], answer: str) -> bool | None:
        """What the model says; None where it did not answer, or not in the asked form."""
        assert self.client is not None
        text = f"Question: {question['question']}\nReference answer: {question['answer']}\nAnswer: {answer}\n\n{RULE}"
        request = ChatRequest(
            SYSTEM,
            (Turn("user", (text,)),),
            schema=SCHEMA,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        try:
            priced = await self.client.ask(request, question["question_id"])
        except RowError:
            return None
        if priced.reply.cut_off and not self._warned_of_cut:
            self._warned_of_cut = True
            log.warning(
                "the grading model was cut off at sample.equivalence.max_tokens=%d, thoughts included; raise it",
                self.max_tokens,
            )
        try:
            return parse(priced.reply.text, SameForm, "grade_reply").same
        except RowError:
            return None


class MakeGrader:
    """What an actor makes its grader from; the driver starts the budget of the model's API here."""

    def __init__(self, config: EquivalenceConfig, apis: Apis | None) -> None:
        self.config = config
        self.access: Access | None = None
        engine = config.engine
        # In the driver: all actors share one budget and the stored answers.
        if engine is not None:
            if apis is None:
                raise ValueError(f"sample.equivalence.engine.model={engine.model} needs a folder for its answers")
            self.access = apis.open(engine, engine.model)

    def __call__(self) -> Grader:
        client = self.access.connect() if self.access else None
        return Grader(client, self.config.max_tokens, self.config.temperature)
