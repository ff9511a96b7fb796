"""Beam search that a process reward model guides, on the same engine: solutions grow step by step, the best are kept.

Enters: a question, a policy's engine, a scorer of steps. Leaves: finished solutions with their steps' log-odds, best
first.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from medmm_ray import metrics
from medmm_ray.engines.generator import TextGenerator
from medmm_ray.engines.grader import Grader
from medmm_ray.tables import RowError
from medmm_ray.text import question_with_options
from medmm_ray.tree_search.writer import Writer, WriterConfig

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model import RewardModel


class BeamSearchConfig(WriterConfig):
    """How wide the search is."""

    num_beams: int = Field(4, ge=1)
    """Solutions that are kept after each step."""
    num_expansions: int = Field(4, ge=1)
    """Next steps that are drawn for each of them; equal ones count once."""
    aggregate: metrics.Aggregate = "min"
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
    """A reward model as a scorer, in a thread of its own so that the engine goes on meanwhile."""

    def __init__(self, model: "RewardModel", documents: Sequence[str] = ()) -> None:
        self.model, self.documents = model, documents
        self.turn = asyncio.Lock()

    async def __call__(
        self, question: Mapping[str, Any], solutions: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[float]]:
        asked = question_with_options(question["question"], question["options"])
        async with self.turn:
            scores = await asyncio.to_thread(self.model.score, asked, solutions, self.documents)
        if faults := [score.error for score in scores if score.error is not None]:
            raise RowError("not_scored", faults[0])
        return [
            [text + image for text, image in zip(score.text_log_odds, score.image_log_odds, strict=True)]
            for score in scores
        ]


async def beam_search(
    config: BeamSearchConfig,
    generator: TextGenerator,
    question: Mapping[str, Any],
    scorer: StepScorer,
    config_hash: str,
    grader: Grader | None = None,
) -> list[Beam]:
    """At most `num_beams` finished solutions of a question row, best first.

    Raises `RowError` where the prompt is too long or a solution cannot be scored.
    """
    writer = Writer(config, generator, question, config_hash, grader or Grader())
    beams = [Beam()]
    while any(beam.answer is None for beam in beams):
        open_ = [beam for beam in beams if beam.answer is None]
        grown = await asyncio.gather(*(expand(writer, beam, config.num_expansions) for beam in open_))
        fresh = [beam for below in grown for beam in below]
        scores = await scorer(question, [beam.steps for beam in fresh]) if fresh else []
        scored = [
            Beam(b.steps, b.answer, b.correct, tuple(odds), metrics.aggregate(list(odds), config.aggregate))
            for b, odds in zip(fresh, scores, strict=True)
        ]
        beams = best([beam for beam in beams if beam.answer is not None] + scored, config.num_beams)
    return beams


async def expand(writer: Writer, beam: Beam, width: int) -> list[Beam]:
    """The beam with each step that may follow; with all to its end where only one step is left."""
    is_last = len(beam.steps) + 1 >= writer.config.max_steps
    found = await writer.draw(beam.steps, "finish" if is_last else "reason", width)
    return [Beam((*beam.steps, *drawn.steps), drawn.answer, drawn.correct) for drawn in found]


def best(beams: Sequence[Beam], number: int) -> list[Beam]:
    """The `number` of highest reward, the first of equals."""
    return sorted(beams, key=lambda beam: -beam.reward)[:number]
