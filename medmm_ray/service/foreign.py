"""Bodies that other servers' clients send, and the answers that they read: Cohere's and Jina's rerank, vLLM's score.

Enters: such a body. Leaves: the cases that it asks about, and its answer from their scores. A ``document`` is a
candidate solution there, and a relevance score the solution's reward: the aggregate of its steps' probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from medmm_ray.service.messages import Answer, Message, Words
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import Aggregate, RerankAnswer, RerankRequest, Solution, Usage

# Cohere's and Jina's rerank


class TextDocument(Message):
    """A candidate solution as an object."""

    text: Words


class CohereRequest(Message):
    """Cohere's and Jina's body: `documents` are the candidate solutions to `query`."""

    query: Words
    """The question, its options in the text."""
    documents: list[Words | TextDocument] = Field(min_length=1)
    """Candidate solutions, as texts or as `{"text": …}`."""
    top_n: int | None = Field(default=None, ge=0)
    """How many of the best are answered; none, and 0 as vLLM has it: all."""
    return_documents: bool = False
    """Whether the answer repeats the solutions."""
    model: str | None = None
    """Name of the model; none: the one that is served."""
    image: Words | None = None
    """The question's image as base64; no field of theirs."""
    aggregate: Aggregate = "min"
    """Which aggregate of the step probabilities the relevance score is; no field of theirs."""

    def case(self) -> RerankRequest:
        """The same as a request of ours."""
        solutions: list[Solution] = []
        for document in self.documents:
            solutions.append(document if isinstance(document, str) else document.text)
        return RerankRequest(
            question=self.query,
            solutions=solutions,
            image=self.image,
            model=self.model,
            aggregate=self.aggregate,
        )


class CohereResult(Answer):
    """One solution's place in the ranking: the list is in order, best first."""

    index: int
    """Position among the request's `documents`, from 0."""
    relevance_score: float
    """The solution's reward, in [0, 1]."""
    document: TextDocument | None = None
    """The solution, where `return_documents` asks for it."""


class CohereMeta(Answer):
    """What Cohere's answer has beside the results."""

    warnings: list[str] = Field(default=[])
    """Solutions that could not be scored, and are not among the results; what the model was not trained on."""


class CohereAnswer(Answer):
    """Cohere's and Jina's answer: `meta` is the one's, `model` and `usage` the other's."""

    id: str
    """The request's id."""
    model: str
    results: list[CohereResult]
    usage: Usage | None = None
    meta: CohereMeta = CohereMeta()


def cohere_answer(request: CohereRequest, answer: RerankAnswer, request_id: str) -> CohereAnswer:
    """Our answer to `request.case()` in their shape."""
    results: list[CohereResult] = []
    # Slicing with None takes all, and so must 0.
    for index in answer.ranking[: request.top_n or None]:
        document = request.documents[index]
        if isinstance(document, str):
            document = TextDocument(text=document)
        reward = answer.solutions[index].reward
        assert reward is not None, "the ranking has scored solutions only"
        results.append(
            CohereResult(
                index=index,
                relevance_score=reward,
                document=document if request.return_documents else None,
            )
        )
    warnings = list(answer.warnings)
    for solution in answer.solutions:
        if solution.error is not None:
            warnings.append(f"documents.{solution.index} has no score: {solution.error}")
    return CohereAnswer(
        id=request_id,
        model=answer.model,
        results=results,
        usage=answer.usage,
        meta=CohereMeta(warnings=warnings),
    )


# vLLM's score


Texts = Words | list[Words]
PAIRS_OF_NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


class VllmScoreRequest(Message):
    """vLLM's body: a question, or one for each solution, on the one side, and solutions on the other.

    The names of the sides are any of vLLM's four pairs.
    """

    model: str | None = None
    """Name of the model; none: the one that is served."""
    text_1: Texts | None = None
    """The question, its options in the text; or a list, one for each solution."""
    text_2: Texts | None = None
    """The solution, or several."""
    queries: Texts | None = None
    """As `text_1`."""
    documents: Texts | None = None
    """As `text_2`."""
    items: Texts | None = None
    """As `text_2`."""
    data_1: Texts | None = None
    """As `text_1`."""
    data_2: Texts | None = None
    """As `text_2`."""
    aggregate: Aggregate = "min"
    """Which aggregate of the step probabilities the score is; no field of vLLM's."""

    @model_validator(mode="after")
    def _is_one_pair(self) -> "VllmScoreRequest":
        self.sides()
        return self

    def sides(self) -> tuple[list[str], list[str]]:
        """The questions and the solutions, as many of each. Raises ValueError where they do not fit together."""
        sides = {name for pair in PAIRS_OF_NAMES for name in pair}
        names = {name for name in sides if getattr(self, name) is not None}
        for first, second in PAIRS_OF_NAMES:
            if names == {first, second}:
                return _paired(_listed(getattr(self, first)), _listed(getattr(self, second)))
        pairs = ", ".join(f"{first} and {second}" for first, second in PAIRS_OF_NAMES)
        raise ValueError(f"{', '.join(sorted(names)) or 'no side'} was sent; expected one pair of {pairs}")

    def cases(self) -> "list[PairsOfCase]":
        """The requests of ours that score all pairs: one a question, so that its solutions share a prefix."""
        places: dict[str, list[int]] = {}
        questions, solutions = self.sides()
        for place, question in enumerate(questions):
            places.setdefault(question, []).append(place)
        cases: list[PairsOfCase] = []
        for question, members in places.items():
            candidates: list[Solution] = [solutions[place] for place in members]
            request = RerankRequest(
                question=question,
                solutions=candidates,
                model=self.model,
                aggregate=self.aggregate,
            )
            cases.append(PairsOfCase(request, members))
        return cases


@dataclass(frozen=True)
class PairsOfCase:
    """A question with its solutions, and the place of each among the pairs."""

    request: RerankRequest
    places: Sequence[int]


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _paired(questions: list[str], solutions: list[str]) -> tuple[list[str], list[str]]:
    if not questions or not solutions:
        raise ValueError("a side is empty; expected at least one question and one solution")
    # One question for all, as vLLM reads it.
    if len(questions) == 1:
        questions = questions * len(solutions)
    if len(questions) != len(solutions):
        raise ValueError(f"{len(questions)} questions for {len(solutions)} solutions; expected one, or as many")
    return questions, solutions


class VllmScore(Answer):
    """One pair's score."""

    index: int
    """Position among the pairs, from 0."""
    object: Literal["score"] = "score"
    score: float
    """The solution's reward, in [0, 1]."""


class VllmScoreAnswer(Answer):
    """vLLM's answer."""

    id: str
    """The request's id."""
    object: Literal["list"] = "list"
    created: int
    """Seconds since 1970."""
    model: str
    data: list[VllmScore]
    usage: Usage | None = None


def vllm_answer(
    cases: Sequence[PairsOfCase],
    answers: Sequence[RerankAnswer],
    request_id: str,
    created: int,
) -> VllmScoreAnswer:
    """Our answers to `cases`, one each, in vLLM's shape.

    Raises `Problem` where a solution could not be scored: vLLM's answer has no place to say so.
    """
    scores: dict[int, float] = {}
    for case, answer in zip(cases, answers, strict=True):
        for place, solution in zip(case.places, answer.solutions, strict=True):
            if solution.reward is None:
                raise Problem(Kind.INVALID, f"solution {place} has no score: {solution.error}")
            scores[place] = solution.reward
    return VllmScoreAnswer(
        id=request_id,
        created=created,
        model=answers[0].model,
        data=[VllmScore(index=place, score=scores[place]) for place in sorted(scores)],
        usage=total_usage([answer.usage for answer in answers]),
    )


def total_usage(usages: Sequence[Usage | None]) -> Usage | None:
    """What several cases cost together; None where one was not counted."""
    total = 0
    for usage in usages:
        if usage is None:
            return None
        total += usage.prompt_tokens
    return Usage(prompt_tokens=total, total_tokens=total)
