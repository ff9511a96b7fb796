"""One rerank request and its answer, pure: what a client sends, what goes to the reward model, what comes back.

Enters: a `RerankRequest` and, for each of its solutions, the log-odds that the reward model gives to each step.
Leaves: a `RerankAnswer`: probabilities, aggregates, ranking, the answers chosen by best-of-N, SC+RM and majority vote.
"""

import base64
import binascii
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medmm_ray import text
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import decode_image
from medmm_ray.stats import decoders, metrics

if TYPE_CHECKING:
    from PIL.Image import Image

Aggregate = Literal["min", "last", "mean"]
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
AnswerType = Literal["choice", "yes_no", "open"]
Words = Annotated[str, Field(pattern=r"\S")]  # text that is more than white space


class StepLogOdds(Protocol):
    """What the reward model says of one solution: log-odds of ``+`` for each step = text part + image part."""

    @property
    def text_log_odds(self) -> Sequence[float]: ...
    @property
    def image_log_odds(self) -> Sequence[float]: ...
    @property
    def error(self) -> str | None: ...


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RerankRequest(_Message):
    """A question, what is known about it, and the candidate solutions to put in order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "question": "What does the chest radiograph show?",
                    "options": ["No finding", "Right pleural effusion", "Left pleural effusion", "Cardiomegaly"],
                    "documents": ["A pleural effusion blunts the costophrenic angle on its side."],
                    "solutions": [
                        "Step 1: The left costophrenic angle is blunted. Step 2: So the answer is (C).",
                        ["The right costophrenic angle is blunted.", "So the answer is (B)."],
                    ],
                    "aggregate": "min",
                }
            ]
        }
    )

    question: Words
    """The question, without its options."""
    solutions: list[Words | Annotated[list[Words], Field(min_length=1)]] = Field(min_length=1)
    """Candidate solutions: a text with `Step 1:` … marks, cut at those alone, as Med-PRM's own code cuts it (a text
    without them is one step), or a list of steps. Neither is edited: send a list where marks are of another kind."""
    options: list[Words] = Field(default=[], max_length=len(text.LETTERS))
    """Answer options in the order of their letters (A, B, …); empty for yes/no and open questions."""
    answer_type: AnswerType = "choice"
    """How an answer is read from a solution: a letter (choice), yes or no (yes_no), or the stated text (open)."""
    documents: list[Words] = []
    """Texts of supporting documents, best first."""
    image: Words | None = Field(default=None, examples=[None])
    """The question's image as base64 (PNG, JPEG, …), a `data:` URL is accepted; none: the text model alone scores."""
    reference_images: list[Words] = []
    """Similar cases' images as base64, most similar first; they need `image`."""
    aggregate: Aggregate = "min"
    """Which aggregate of the step probabilities is a solution's reward."""


class StepScore(_Message):
    text: str
    """The step, without its mark."""
    probability: float
    """Probability that the step is right: sigmoid(text_log_odds + image_log_odds)."""
    text_log_odds: float
    """What question, documents and the solution so far speak for the step."""
    image_log_odds: float
    """What the image speaks for the step; exactly 0 without an image."""


class ScoredSolution(_Message):
    index: int
    """Position in the request, from 0."""
    rank: int | None
    """1 is best; null where the solution could not be scored."""
    answer: str | None
    """The answer that the solution states; null where it states none."""
    reward: float | None
    """The aggregate that was asked for."""
    aggregates: dict[Aggregate, float]
    """Smallest, last and mean step probability."""
    steps: list[StepScore]
    error: str | None = None
    """Why the solution could not be scored."""


class ChosenAnswer(_Message):
    answer: str | None
    """The chosen answer; null where no scored solution states one."""
    solution: int | None
    """Index of the best solution that gives it."""
    support: float
    """Its share of the votes (SC+RM: of the rewards); of best-of-N the reward itself."""


class RerankAnswer(_Message):
    model: str
    arm: Literal["multimodal", "text_only"]
    """Whether an image took part in the scores."""
    aggregate: Aggregate
    ranking: list[int]
    """Indices of the scored solutions, best first; ties keep the order of the request."""
    best_of_n: ChosenAnswer
    """The answer of the solution with the highest reward."""
    sc_rm: ChosenAnswer
    """The answer with the largest sum of rewards over its solutions."""
    majority: ChosenAnswer
    """The answer that most solutions give, for comparison: no reward takes part."""
    solutions: list[ScoredSolution]


@dataclass(frozen=True)
class ModelInput:
    """What the reward model gets: all solutions of one question. `context_key` names everything but the solutions."""

    question: str
    solutions: tuple[str | tuple[str, ...], ...]
    documents: tuple[str, ...]
    image: "Image | None" = field(repr=False)
    reference_images: "tuple[Image, ...]" = field(repr=False)
    context_key: str


def to_model_input(request: RerankRequest, max_image_pixels: int) -> ModelInput:
    """Steps split, images decoded. Raises `RowError` (image_encoding, image_corrupt, image_too_large, …)."""
    if request.reference_images and request.image is None:
        raise RowError("image_missing", f"{len(request.reference_images)} reference_images were sent without an image")
    encoded = [("image", request.image)] if request.image else []
    encoded += [(f"reference_images.{i}", image) for i, image in enumerate(request.reference_images)]
    contents = [(name, from_base64(name, value)) for name, value in encoded]
    pictures = [decode_image(content, name, max_image_pixels) for name, content in contents]
    shared = hashlib.sha256()
    for part in (request.question, *request.options, "", *request.documents):
        shared.update(hashlib.sha256(part.encode()).digest())
    for _, content in contents:
        shared.update(hashlib.sha256(content).digest())
    return ModelInput(
        question=text.question_with_options(request.question, request.options),
        solutions=tuple(s if isinstance(s, str) else tuple(s) for s in request.solutions),
        documents=tuple(request.documents),
        image=pictures[0] if pictures else None,
        reference_images=tuple(pictures[1:]),
        context_key=shared.hexdigest(),
    )


def steps_of(solution: str | list[str]) -> list[str]:
    """The steps as a reward model scores them, for reading: raw text is cut where the reference cuts it."""
    return [text.without_mark(step) for step in text.cut_steps(solution)] if isinstance(solution, str) else solution


def from_base64(name: str, value: str) -> bytes:
    """The bytes of a base64 text or ``data:`` URL; `name` is what an error calls it."""
    body = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise RowError(
            "image_encoding",
            f"{name} is not base64 ({error}; {len(value)} characters); send the file's bytes as base64",
        ) from None


def rerank(request: RerankRequest, scores: Sequence[StepLogOdds], model: str) -> RerankAnswer:
    """The answer to `request` from the log-odds of its solutions, in its order.

    A solution with a score that is not finite has an error in place of a rank, and changes nothing for the others.
    """
    errors = [_error(score) for score in scores]
    totals = [[] if error else _total(score) for score, error in zip(scores, errors, strict=True)]
    rewards = [decoders.aggregate(t, request.aggregate) if t else math.nan for t in totals]  # as log-odds, exact near 1
    ranking = sorted((i for i, t in enumerate(totals) if t), key=lambda i: -rewards[i])
    rank = {i: place for place, i in enumerate(ranking, 1)}
    solutions = [
        _scored(request, i, score, total, rank.get(i), error)
        for i, (score, total, error) in enumerate(zip(scores, totals, errors, strict=True))
    ]
    answers = [s.answer for s in solutions]
    best = decoders.best_of_n(rewards)
    return RerankAnswer(
        model=model,
        arm="text_only" if request.image is None else "multimodal",
        aggregate=request.aggregate,
        ranking=ranking,
        best_of_n=ChosenAnswer(
            answer=None if best is None else answers[best],
            solution=best,
            support=0.0 if best is None else float(metrics.probability(rewards[best])),
        ),
        sc_rm=_vote(answers, ranking, rewards),
        majority=_vote(answers, ranking, None),
        solutions=solutions,
    )


def _total(score: StepLogOdds) -> list[float]:
    """Log-odds of each step."""
    return [t + v for t, v in zip(score.text_log_odds, score.image_log_odds, strict=True)]


def _error(score: StepLogOdds) -> str | None:
    """Why a solution has no score; its own error, or scores that are no numbers."""
    if score.error is not None:
        return score.error
    total = _total(score)
    missing = sum(not math.isfinite(x) for x in total)
    if not missing:
        return None
    return (
        f"not_finite: {missing} of {len(total)} step scores are no finite numbers; serve the model in bfloat16 or "
        "float32 (dtype)"
    )


def _scored(
    request: RerankRequest, index: int, score: StepLogOdds, total: list[float], rank: int | None, error: str | None
) -> ScoredSolution:
    solution = request.solutions[index]
    steps = steps_of(solution)
    stated = solution if isinstance(solution, str) else text.join_steps(steps)
    aggregates = {how: float(metrics.probability(decoders.aggregate(total, how))) for how in AGGREGATES if total}
    return ScoredSolution(
        index=index,
        rank=rank,
        answer=text.extract_answer(stated, request.options, request.answer_type),
        reward=aggregates.get(request.aggregate),
        aggregates=aggregates,
        steps=[
            StepScore(text=step, probability=float(metrics.probability(t + v)), text_log_odds=t, image_log_odds=v)
            for step, t, v in zip(steps, score.text_log_odds, score.image_log_odds, strict=True)
        ]
        if total
        else [],
        error=error,
    )


def _vote(answers: Sequence[str | None], ranking: Sequence[int], rewards: Sequence[float] | None) -> ChosenAnswer:
    """The winning answer, its best solution and its share of the votes; without `rewards` each solution counts one.

    Answers are one where grading finds them equal (`text.equal_key`); the first of them gives the words.
    """
    winner = decoders.vote(answers, rewards)
    if winner is None:
        return ChosenAnswer(answer=None, solution=None, support=0.0)
    codes = decoders.answer_codes(answers)
    weights = np.ones(len(answers)) if rewards is None else np.nan_to_num(metrics.probability(rewards))
    mine = codes == codes[winner]
    best = next((i for i in ranking if mine[i]), winner)
    support = float(weights[mine].sum() / weights[codes >= 0].sum())
    return ChosenAnswer(answer=answers[winner], solution=best, support=support)
