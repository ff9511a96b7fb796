"""A policy that writes a solution step by step: its next steps, the end of its solution, rollouts from a prefix.

The samples of one prefix are one request. Seeds come from the question, the steps so far, the purpose and the table's
fingerprint: a request gives the same whatever runs beside it. No prompt carries the gold answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from medmm_ray.config import execution
from medmm_ray.data.tables import RowError
from medmm_ray.engines.generator import (
    Completion,
    GeneratorConfig,
    Sampling,
    TextGenerator,
    policy_prompt,
    request_seed,
)
from medmm_ray.engines.grader import Grader
from medmm_ray.text import extract_answer, solution_prefix, split_steps, step_mark

Action = Literal["reason", "finish", "reflect"]

DOUBT = " But wait,"
_MARKUP = re.compile(r"\n\s*(?:#+|\*\*)\s*$")  # of the next step's mark, before its words


class StepWriterConfig(GeneratorConfig):
    """How a policy writes, step by step."""

    temperature: float = Field(0.6, ge=0)
    """Sampling temperature of steps and rollouts."""
    top_k: int = Field(0, ge=0)
    """Tokens to draw from, most likely first; 0 takes all."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Probability mass to draw from."""
    max_tokens: int = Field(1024, ge=1)
    """Longest step or rollout, tokens; one that is cut there does not count."""
    max_steps: int = Field(9, ge=1)
    """Most steps of a solution."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt."""
    seed: int = 0
    """Start of all random numbers."""
    max_concurrency: int = execution(16)
    """Calls of an actor at a time; batch_size x max_concurrency questions are worked on at once."""

    @model_validator(mode="after")
    def _reads_text(self) -> "StepWriterConfig":
        if self.num_images:
            raise ValueError(
                f"num_images is {self.num_images}, but policies that look are not searched yet; set it to 0"
            )
        return self


@dataclass(frozen=True)
class Continuation:
    """Steps that a policy wrote behind others; `answer` where it ended the solution with them.

    `correct` says of the answer whether it is right; None where it could not be graded.
    """

    steps: tuple[str, ...]
    answer: str | None = None
    correct: bool | None = None
    seed: int = 0


class StepWriter:
    """The policy on one question; it counts the tokens it drew and the samples that were no use.

    Raises `RowError` where the prompt itself is too long.
    """

    def __init__(
        self, config: StepWriterConfig, generator: TextGenerator, question: Mapping[str, Any], config_hash: str,
        grader: Grader,
    ) -> None:  # fmt: skip
        self.config, self.generator, self.question, self.grader = config, generator, question, grader
        self.key = (config_hash, question["question_id"])
        self.num_tokens = self.num_rejected = 0
        self.prompt = policy_prompt(generator, question, config.num_documents, config.max_model_len - config.max_tokens)

    async def draw(self, steps: Sequence[str], action: Action, n: int) -> list[Continuation]:
        """What may follow `steps`: the next step (reason), or all to the end, perhaps with a doubt before it (reflect).

        Equal samples come once; cut, empty and answerless ones, and those of too many steps, are rejected.
        """
        said = solution_prefix(steps) + (DOUBT if action == "reflect" else "")
        stop = step_mark(len(steps) + 2) if action == "reason" else None
        samples = await self._ask("step", steps, said, n, stop)
        read = [self._read(said, len(steps), sample, stop) for sample in samples]
        self.num_rejected += read.count(None)
        once: dict[tuple[str, ...], Continuation] = {}
        for drawn in read:
            if drawn:
                once.setdefault(drawn.steps, drawn)
        grades = await self.grader.grade(self.question, [drawn.answer for drawn in once.values()])
        return [replace(drawn, correct=verdict) for drawn, verdict in zip(once.values(), grades.right, strict=True)]

    def _read(self, said: str, before: int, sample: Completion, stop: str | None) -> Continuation | None:
        if sample.finish_reason != "stop":
            return None
        stopped = bool(stop) and sample.text.endswith(str(stop))
        text = _MARKUP.sub("", sample.text.removesuffix(str(stop))) if stopped else sample.text
        steps = split_steps(said[said.rindex(step_mark(before + 1)) :] + text)[1]
        if stopped:
            return Continuation((steps[0],), seed=sample.seed) if steps else None
        answer = extract_answer(said + text, self.question["options"], self.question["answer_type"])
        if answer is None or not steps or before + len(steps) > self.config.max_steps:
            return None
        return Continuation(tuple(steps), answer, seed=sample.seed)

    async def roll(self, steps: Sequence[str], n: int) -> list[bool]:
        """Whether each of `n` continuations that ended with an answer is right; the others do not count, nor do answers
        that could not be graded.
        """
        said = solution_prefix(steps)
        samples = await self._ask("rollout", steps, said, n)
        asked = self.question
        answers = [
            extract_answer(said + sample.text, asked["options"], asked["answer_type"])
            for sample in samples
            if sample.finish_reason == "stop"
        ]
        return [verdict for verdict in (await self.grader.grade(asked, answers)).right if verdict is not None]

    async def _ask(
        self, purpose: str, steps: Sequence[str], said: str, n: int, stop: str | None = None
    ) -> list[Completion]:
        """One request; nothing comes back where the steps have outgrown the model's length."""
        config = self.config
        seed = request_seed("writer", config.seed, *self.key, purpose, said)
        sampling = Sampling(config.temperature, config.top_k, config.top_p, config.max_tokens, (stop,) if stop else ())
        try:
            samples = await self.generator.generate(replace(self.prompt, prefix=said), n, seed, sampling)
        except RowError:
            if not steps:
                raise
            return []
        self.num_tokens += sum(sample.num_tokens for sample in samples)
        return samples
