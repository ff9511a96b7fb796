"""One rerank request and its answer, pure: what a client sends, what goes to the reward model, what comes back.

Enters: a `RerankRequest` and, for each of its solutions, the log-odds that the reward model gives to each step.
Leaves: a `RerankAnswer`: probabilities, aggregates, ranking, the answers chosen by best-of-N, SC+RM and majority vote.
"""

import binascii
import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, get_args

import numpy as np
import pybase64
from pydantic import Field

from medmm_ray import text
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import decode_image
from medmm_ray.service.evidence import EvidenceRequest, RetrievedEvidence
from medmm_ray.service.messages import Answer, Message, Words
from medmm_ray.stats import decoders, metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

Aggregate = Literal["min", "last", "mean"]
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
AnswerType = Literal["choice", "yes_no", "open"]
Arm = Literal["multimodal", "text_only"]
ANSWER_CHARS = 8000
"""The end of a solution in which its answer is looked for: more than any model reads, and a bound of what it costs."""


class StepLogOdds(Protocol):
    """What the reward model says of one solution: log-odds of ``+`` for each step = text part + image part."""

    @property
    def text_log_odds(self) -> Sequence[float]:
        """The text's part of each step's log-odds."""

    @property
    def image_log_odds(self) -> Sequence[float]:
        """The images' part of each step's log-odds."""

    @property
    def error(self) -> str | None:
        """Why the solution has no score; None where it has one."""


Solution = Words | Annotated[list[Words], Field(min_length=1)]
"""A text with ``Step 1:`` … marks, or a list of steps."""


class Context(Message):
    """A question and what is known about it: all that solutions to it share."""

    question: Words
    """The question, without its options."""
    options: list[Words] = Field(default=[], max_length=len(text.LETTERS))
    """Answer options in the order of their letters (A, B, …); empty for yes/no and open questions."""
    documents: list[Words] = Field(default=[])
    """Texts of supporting documents, best first."""
    image: Words | None = Field(default=None, examples=[None])
    """The question's image as base64 (PNG, JPEG, …), a `data:` URL is accepted; none: the text model alone scores."""
    reference_images: list[Words] = Field(default=[])
    """Similar cases' images as base64, most similar first; they need `image`."""
    retrieve: EvidenceRequest | None = None
    """How much evidence to look up in the served index, behind what the request has of its own; none: nothing."""
    model: str | None = None
    """Name of the model, one of `GET /v1/models`; none: the one that is served."""


class Case(Context):
    """A question, what is known about it, and its candidate solutions."""

    solutions: list[Solution] = Field(min_length=1)
    """Candidate solutions: a text with `Step 1:` … marks, cut at those alone, as Med-PRM's own code cuts it (a text
    without them is one step), or a list of steps. Neither is edited: send a list where marks are of another kind."""


class RerankRequest(Case):
    """A question, what is known about it, and the candidate solutions to put in order."""

    answer_type: AnswerType = "choice"
    """How an answer is read from a solution: a letter (choice), yes or no (yes_no), or the stated text (open)."""
    aggregate: Aggregate = "min"
    """Which aggregate of the step probabilities is a solution's reward."""


class Usage(Answer):
    """What a request cost."""

    prompt_tokens: int
    """Tokens that the model read, those that the solutions share counted once."""
    total_tokens: int
    """The same: nothing is generated."""


class StepScore(Answer):
    text: str
    """The step, without its mark."""
    probability: float
    """Probability that the step is right: sigmoid(text_log_odds + image_log_odds)."""
    text_log_odds: float
    """The part of the step's log-odds that question, documents and the solution so far contribute."""
    image_log_odds: float
    """The part that the images contribute; exactly 0 without an image."""


class ScoredSolution(Answer):
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


class ChosenAnswer(Answer):
    answer: str | None
    """The chosen answer; null where no scored solution states one."""
    solution: int | None
    """Index of the best solution that gives it."""
    support: float
    """Its share of the votes (SC+RM: of the rewards); of best-of-N the reward itself."""


class RerankAnswer(Answer):
    model: str
    arm: Arm
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
    warnings: list[str] = Field(default=[])
    """What of the request is outside of what the model was trained on, so that the scores may be worth less."""
    evidence: RetrievedEvidence | None = None
    """What was retrieved, where `retrieve` asked for it."""
    usage: Usage | None = None
    """What the request cost; null where it was not counted."""


@dataclass(frozen=True)
class Scored:
    """What the model says of a case: its solutions in order, and the tokens that were read (None: not counted)."""

    solutions: Sequence[StepLogOdds]
    num_tokens: int | None = None
    evidence: RetrievedEvidence | None = None

    @property
    def usage(self) -> Usage | None:
        """The tokens, as an answer states them."""
        if self.num_tokens is None:
            return None
        return Usage(prompt_tokens=self.num_tokens, total_tokens=self.num_tokens)


@dataclass(frozen=True)
class ModelTraits:
    """What the served model can read, and what it was trained on; None: it is not known."""

    has_image_tower: bool
    num_documents: int | None = None
    num_references: int | None = None

    def warnings(self, request: Context) -> list[str]:
        """A sentence for each list of the request that is longer than any that the model was trained on."""
        sentences: list[str] = []
        for name, number, trained_on in (
            ("documents", len(request.documents), self.num_documents),
            ("reference_images", len(request.reference_images), self.num_references),
        ):
            # Fewer is nothing new to the model: retrieval finds fewer where little is similar.
            if trained_on is not None and number > trained_on:
                sentences.append(
                    f"{name}: {number} were sent, and the model was trained on {trained_on}; send the best {trained_on}"
                    if trained_on
                    else f"{name}: {number} were sent, and the model was trained without; leave them out"
                )
        return sentences


@dataclass(frozen=True)
class ModelInput:
    """What the reward model gets: all solutions of one question. `context_key` names everything but the solutions."""

    question: str
    solutions: tuple[str | tuple[str, ...], ...]
    documents: tuple[str, ...]
    image: "Image | None" = field(repr=False)
    reference_images: "tuple[Image, ...]" = field(repr=False)
    context_key: str

    @property
    def num_pixels(self) -> int:
        """Pixels of all its images."""
        images = [*self.reference_images]
        if self.image is not None:
            images.append(self.image)
        return sum(image.width * image.height for image in images)


def to_model_input(request: Case, max_image_pixels: int) -> ModelInput:
    """Steps split, images decoded. Raises `RowError` (image_encoding, image_corrupt, image_too_large, …)."""
    if request.reference_images and request.image is None:
        raise RowError("image_missing", f"{len(request.reference_images)} reference_images were sent without an image")
    files = _image_files(request)
    images = [decode_image(content, name, max_image_pixels) for name, content in files.items()]
    solutions = [solution if isinstance(solution, str) else tuple(solution) for solution in request.solutions]
    return ModelInput(
        question=text.question_with_options(request.question, request.options),
        solutions=tuple(solutions),
        documents=tuple(request.documents),
        image=images[0] if images else None,
        reference_images=tuple(images[1:]),
        context_key=_context_key(request, list(files.values())),
    )


def _image_files(request: Context) -> dict[str, bytes]:
    """The image files of a request by the key of the body that has them, the question's own first."""
    files = {}
    if request.image:
        files["image"] = from_base64("image", request.image)
    for i, image in enumerate(request.reference_images):
        name = f"reference_images.{i}"
        files[name] = from_base64(name, image)
    return files


def _context_key(request: Context, files: Sequence[bytes]) -> str:
    """A hash of everything but the solutions: requests with the same one share a prefix."""
    shared = hashlib.sha256()
    for part in (request.question, *request.options, "", *request.documents):
        # Each part's own hash, of a fixed length: no two lists of parts run into the same bytes.
        shared.update(hashlib.sha256(part.encode()).digest())
    for content in files:
        shared.update(hashlib.sha256(content).digest())
    return shared.hexdigest()


def steps_of(solution: str | list[str]) -> list[str]:
    """The steps as a reward model scores them, for reading: raw text is cut where the reference cuts it."""
    if not isinstance(solution, str):
        return solution
    return [text.without_mark(step) for step in text.cut_steps(solution)]


def from_base64(name: str, value: str) -> bytes:
    """The bytes of a base64 text or ``data:`` URL; `name` is what an error calls it."""
    body = value.partition(",")[2] if value.startswith("data:") else value
    # Not Python's own, which lets no other thread run for the 16 ms that 5 MB take it.
    with suppress(ValueError):
        return pybase64.b64decode(body, validate=True)
    # Some encoders break lines; anything else that is not of the alphabet is an error.
    try:
        characters = b"".join(body.encode("ascii").split())
        return pybase64.b64decode(characters, validate=True)
    except UnicodeEncodeError as error:
        fault = f"character {error.start} is not ASCII"
    except binascii.Error:
        is_cut = len(characters) % 4 > 0
        fault = "its length is no multiple of 4" if is_cut else "a character is not of its alphabet"
    raise RowError(
        "image_encoding", f"{name} is not base64 ({fault}; {len(value)} characters); send the file's bytes as base64"
    )


@dataclass(frozen=True)
class StepTotals:
    """A solution's log-odds of each step, text and image together; none, and an error, where it has no score."""

    log_odds: list[float]
    error: str | None


def rerank(
    request: RerankRequest,
    scored: Scored,
    model: str,
    warnings: Sequence[str] = (),
    answers: Sequence[str | None] | None = None,
) -> RerankAnswer:
    """The answer to `request` from the log-odds of its solutions, in its order.

    A solution with a score that is not finite has an error in place of a rank, and changes nothing for the others.
    `answers`: what `stated_answers` gives, where it was called before.
    """
    if answers is None:
        answers = stated_answers(request)
    totals = [step_totals(score) for score in scored.solutions]
    log_odds = {how: _aggregated(totals, how) for how in AGGREGATES}
    aggregates = {how: metrics.probability(of_solutions).tolist() for how, of_solutions in log_odds.items()}
    rewards = log_odds[request.aggregate].tolist()
    ranking = [i for i, total in enumerate(totals) if total.log_odds]
    # A stable sort: equal rewards keep the order of the request.
    ranking.sort(key=lambda i: -rewards[i])
    ranks = {i: rank for rank, i in enumerate(ranking, 1)}
    solutions = []
    for i, (solution, total) in enumerate(zip(request.solutions, totals, strict=True)):
        of_solution: dict[Aggregate, float] = {}
        if total.log_odds:
            of_solution = {how: values[i] for how, values in aggregates.items()}
        solutions.append(
            ScoredSolution(
                index=i,
                rank=ranks.get(i),
                answer=answers[i],
                reward=of_solution.get(request.aggregate),
                aggregates=of_solution,
                steps=_step_scores(solution, scored.solutions[i], total),
                error=total.error,
            )
        )
    return RerankAnswer(
        model=model,
        arm=arm_of(request),
        aggregate=request.aggregate,
        ranking=ranking,
        best_of_n=_best_of_n(answers, rewards),
        sc_rm=_vote(answers, ranking, rewards),
        majority=_vote(answers, ranking, None),
        solutions=solutions,
        warnings=list(warnings),
        evidence=scored.evidence,
        usage=scored.usage,
    )


def stated_answers(request: RerankRequest) -> list[str | None]:
    """The answer that each solution of a request states."""
    return [stated_answer(solution, request.options, request.answer_type) for solution in request.solutions]


def step_totals(score: StepLogOdds) -> StepTotals:
    """A solution's log-odds, or the error in their place; a value that is not finite is such an error."""
    if score.error is not None:
        return StepTotals([], score.error)
    # The parts add in log-odds: a sum of probabilities would be none.
    parts = zip(score.text_log_odds, score.image_log_odds, strict=True)
    log_odds = [from_text + from_image for from_text, from_image in parts]
    num_missing = sum(not math.isfinite(value) for value in log_odds)
    if num_missing:
        return StepTotals(
            [],
            f"not_finite: {num_missing} of {len(log_odds)} step scores are no finite numbers; serve the model in "
            "bfloat16 or float32 (dtype)",
        )
    return StepTotals(log_odds, None)


def _aggregated(totals: Sequence[StepTotals], how: Aggregate) -> "NDArray[np.float64]":
    """Each solution's aggregate as log-odds: of probabilities many would round to 1 and tie. NaN without a score."""
    num_steps = np.array([len(total.log_odds) for total in totals])
    all_log_odds = np.array([value for total in totals for value in total.log_odds])
    rewards = np.full(len(totals), np.nan)
    has_score = num_steps > 0
    # All solutions at once: one at a time an array of a few numbers costs more than what is done with it.
    rewards[has_score] = decoders.aggregates(all_log_odds, num_steps[has_score], how)
    return rewards


def _step_scores(solution: str | list[str], score: StepLogOdds, total: StepTotals) -> list[StepScore]:
    if not total.log_odds:
        return []
    probabilities = metrics.probability(total.log_odds).tolist()
    step_scores: list[StepScore] = []
    parts = zip(steps_of(solution), probabilities, score.text_log_odds, score.image_log_odds, strict=True)
    for step, probability, from_text, from_image in parts:
        step_scores.append(
            StepScore(text=step, probability=probability, text_log_odds=from_text, image_log_odds=from_image)
        )
    return step_scores


def arm_of(request: Context) -> Arm:
    """Whether an image takes part in the scores."""
    return "text_only" if request.image is None else "multimodal"


def stated_answer(solution: str | Sequence[str], options: Sequence[str], answer_type: AnswerType) -> str | None:
    """The answer that a solution states; None where it states none."""
    words = solution if isinstance(solution, str) else text.join_steps(solution)
    return text.extract_answer(words[-ANSWER_CHARS:], options, answer_type)


def _best_of_n(answers: Sequence[str | None], rewards: Sequence[float]) -> ChosenAnswer:
    """The answer of the solution with the highest reward."""
    best = decoders.best_of_n(rewards)
    if best is None:
        return ChosenAnswer(answer=None, solution=None, support=0.0)
    return ChosenAnswer(
        answer=answers[best],
        solution=best,
        support=float(metrics.probability(rewards[best])),
    )


def _vote(
    answers: Sequence[str | None],
    ranking: Sequence[int],
    rewards: Sequence[float] | None,
) -> ChosenAnswer:
    """The winning answer, its best solution and its share of the votes; without `rewards` each solution counts one.

    Answers are one where grading finds them equal (`text.equal_key`); the first of them gives the words.
    """
    winner = decoders.vote(answers, rewards)
    if winner is None:
        return ChosenAnswer(answer=None, solution=None, support=0.0)
    codes = decoders.answer_codes(answers)  # -1: no answer
    # A solution without a reward is NaN here, and has no vote.
    weights = np.ones(len(answers)) if rewards is None else np.nan_to_num(metrics.probability(rewards))
    votes_for_winner = codes == codes[winner]
    # By majority an answer may win of which no solution has a score.
    best = next((i for i in ranking if votes_for_winner[i]), winner)
    support = float(weights[votes_for_winner].sum() / weights[codes >= 0].sum())
    return ChosenAnswer(answer=answers[winner], solution=best, support=support)
