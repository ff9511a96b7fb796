"""Beam search that a process reward model guides, on the same engine: solutions grow step by step, the best are kept.

Enters: a policy's writer on a question, a scorer of steps. Leaves: finished solutions with their steps' log-odds, best
first.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from medmm_ray.data.tables import RowError
from medmm_ray.stats import decoders
from medmm_ray.steps.tree_search.writer import Action, StepWriter, StepWriterConfig
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image

    from medmm_ray.reward_model import RewardModel, StepScores


class BeamSearchConfig(StepWriterConfig):
    """What is searched, and how wide."""

    split: str = "test"
    """Split whose questions are searched."""
    num_questions: int | None = Field(None, ge=1)
    """Questions of the split that are searched, the first by id; null: all."""
    guide: Literal["two_tower", "text_prm"] = "two_tower"
    """Which reward model of the run guides the search."""
    num_beams: int = Field(4, ge=1)
    """Solutions that are kept after each step."""
    num_expansions: int = Field(4, ge=1)
    """Next steps that are sampled for each of them; equal ones count once."""
    aggregate: decoders.Aggregate = "min"
    """What the log-odds of a solution's steps become to compare it with others."""


@dataclass(frozen=True)
class Beam:
    """A solution, or the beginning of one (`answer` is None), with its steps' log-odds and their aggregate."""

    steps: tuple[str, ...] = ()
    answer: str | None = None
    correct: bool | None = None
    log_odds: tuple[float, ...] = ()
    reward: float = 0.0


class StepScorer(Protocol):
    """The log-odds of every step of each solution of one question."""

    async def __call__(
        self, question: Mapping[str, Any], solutions: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[float]]: ...


class RewardModelScorer:
    """A reward model as a scorer of one question, in a thread of its own so that the engine goes on meanwhile.

    `images` are the question's own and `references` the similar cases', for a model that reads images. The scorers of
    several questions on one model share its `lock`.
    """

    def __init__(
        self,
        model: "RewardModel",
        documents: Sequence[str] = (),
        images: Sequence["Image"] = (),
        references: Sequence["Image"] = (),
        lock: asyncio.Lock | None = None,
    ) -> None:
        self.model = model
        self.documents = documents
        self.images = images
        self.references = references
        self.lock = lock or asyncio.Lock()

    async def scores(self, question: Mapping[str, Any], solutions: Sequence[Sequence[str]]) -> "list[StepScores]":
        """The scores of each solution, or why it has none."""
        text = question_with_options(question["question"], question["options"])
        # One forward pass at a time: questions of several searches share the model.
        async with self.lock:
            return await asyncio.to_thread(
                self.model.score, text, solutions, self.documents, self.images, self.references
            )

    async def __call__(
        self, question: Mapping[str, Any], solutions: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[float]]:
        scores = await self.scores(question, solutions)
        for score in scores:
            if score.error is not None:
                raise RowError("not_scored", score.error)
        return [score.log_odds for score in scores]


async def beam_search(config: BeamSearchConfig, writer: StepWriter, scorer: StepScorer) -> list[Beam]:
    """At most `num_beams` finished solutions of the writer's question, best first.

    Raises `RowError` where the prompt is too long or a solution cannot be scored.
    """
    beams = [Beam()]
    while True:
        # Finished beams stay in the race with those that grow.
        finished: list[Beam] = []
        unfinished: list[Beam] = []
        for beam in beams:
            if beam.answer is None:
                unfinished.append(beam)
            else:
                finished.append(beam)
        if not unfinished:
            return beams
        requests = [expand(writer, beam, config.num_expansions) for beam in unfinished]
        expansions = await asyncio.gather(*requests)
        expanded = list(chain.from_iterable(expansions))
        scored = await score(
            expanded,
            writer.question,
            scorer,
            config.aggregate,
        )
        beams = best(finished + scored, config.num_beams)


async def expand(writer: StepWriter, beam: Beam, width: int) -> list[Beam]:
    """The beam with each step that may follow; with all to its end where only one step may follow."""
    is_last = len(beam.steps) + 1 >= writer.config.max_steps
    action: Action = "finish" if is_last else "reason"
    beams: list[Beam] = []
    for continuation in await writer.continuations(beam.steps, action, width):
        steps = (*beam.steps, *continuation.steps)
        beams.append(Beam(steps, continuation.answer, continuation.correct))
    return beams


async def score(
    beams: Sequence[Beam], question: Mapping[str, Any], scorer: StepScorer, aggregate: decoders.Aggregate
) -> list[Beam]:
    """The beams with the log-odds of their steps, and the aggregate of these as the reward."""
    if not beams:
        return []
    log_odds = await scorer(question, [beam.steps for beam in beams])
    scored: list[Beam] = []
    # The earlier steps are scored again with the new one: a scorer takes whole solutions.
    for beam, step_log_odds in zip(beams, log_odds, strict=True):
        reward = decoders.aggregate(list(step_log_odds), aggregate)
        scored_beam = replace(
            beam,
            log_odds=tuple(step_log_odds),
            reward=reward,
        )
        scored.append(scored_beam)
    return scored


def best(beams: Sequence[Beam], number: int) -> list[Beam]:
    """The `number` beams of highest reward, the first of equals."""
    # `sorted` keeps the order of equals: finished beams come before those that grow.
    ordered = sorted(beams, key=lambda beam: -beam.reward)
    return ordered[:number]
