"""A policy that writes a solution step by step: its next steps, the end of its solution, rollouts from a prefix.

The samples of one prefix are one request. Seeds come from the question, the steps so far, the purpose and the table's
fingerprint: a request gives the same whatever runs beside it. No prompt carries the gold answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, execution
from medmm_ray.data.tables import RowError
from medmm_ray.engines.generator import Completion, Sampling, TextGenerator, policy_prompt, request_seed
from medmm_ray.engines.grader import Grader
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.text import extract_answer, solution_prefix, split_steps, step_mark

Action = Literal["reason", "finish", "reflect"]

DOUBT = " But wait,"
_MARKUP = re.compile(r"\n\s*(?:#+|\*\*)\s*$")  # of the next step's mark, before its words


class StepWriterEngine(VllmEngine):
    """The engine of a policy that writes step by step."""

    max_concurrency: int = execution(16, ge=1)
    """Calls of an actor at a time; batch_size x max_concurrency questions are worked on at once."""

    @model_validator(mode="after")
    def _has_no_images(self) -> "StepWriterEngine":
        if self.num_images:
            raise ValueError(
                f"num_images is {self.num_images}, but policies that look are not searched yet; set it to 0"
            )
        return self


class StepWriterConfig(Config):
    """How a policy writes, step by step."""

    engine: StepWriterEngine = StepWriterEngine()
    """The engine that runs the policy."""

    temperature: float = Field(0.6, ge=0)
    """Sampling temperature of steps and rollouts."""
    top_k: int = Field(0, ge=0)
    """Tokens to sample from, most likely first; 0 takes all."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Probability mass to sample from."""
    max_tokens: int = Field(1024, ge=1)
    """Longest step or rollout, tokens; one that is cut there does not count."""
    max_steps: int = Field(9, ge=1)
    """Most steps of a solution."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt."""
    seed: int = 0
    """Start of all random numbers."""


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
    """The policy on one question; it counts the tokens that it generated and the samples that were no use.

    Raises `RowError` where the prompt itself is too long.
    """

    def __init__(
        self,
        config: StepWriterConfig,
        generator: TextGenerator,
        question: Mapping[str, Any],
        config_hash: str,
        grader: Grader,
    ) -> None:
        self.config = config
        self.generator = generator
        self.question = question
        self.grader = grader
        self.seed_parts = (config_hash, question["question_id"])
        self.num_tokens = 0
        self.num_rejected = 0
        max_prompt_tokens = config.engine.max_model_len - config.max_tokens
        self.prompt = policy_prompt(
            generator,
            question,
            config.num_documents,
            max_prompt_tokens,
        )

    async def continuations(self, steps: Sequence[str], action: Action, n: int) -> list[Continuation]:
        """What may follow `steps`: the next step (reason), or all to the end, perhaps with a doubt before it (reflect).

        Of `n` samples equal ones come once; cut, empty and answerless ones, and those of too many steps, are rejected.
        """
        prefix = solution_prefix(steps)
        if action == "reflect":
            prefix += DOUBT
        stop = step_mark(len(steps) + 2) if action == "reason" else None
        # Of equal samples the first one stays, with its seed.
        distinct: dict[tuple[str, ...], Continuation] = {}
        for sample in await self._generate("step", steps, prefix, n, stop):
            continuation = self._parse(sample, prefix, len(steps), stop)
            if continuation is None:
                self.num_rejected += 1
            else:
                distinct.setdefault(continuation.steps, continuation)
        answers = [continuation.answer for continuation in distinct.values()]
        # Only distinct answers are graded: a model may be asked.
        grades = await self.grader.grade(self.question, answers)
        graded: list[Continuation] = []
        for continuation, is_right in zip(distinct.values(), grades.right, strict=True):
            graded.append(replace(continuation, correct=is_right))
        return graded

    def _parse(self, sample: Completion, prefix: str, num_steps: int, stop: str | None) -> Continuation | None:
        """The steps of a sample behind the `num_steps` of its prefix; None where it is rejected."""
        if sample.finish_reason != "stop":
            return None
        text = sample.text
        is_stopped = stop is not None and text.endswith(stop)
        if stop is not None and is_stopped:
            text = _MARKUP.sub("", text.removesuffix(stop))
        # From the last mark on, so that marks in the text of earlier steps count for nothing.
        begun_step = prefix[prefix.rindex(step_mark(num_steps + 1)) :]
        _, steps = split_steps(begun_step + text)
        if is_stopped:
            return Continuation((steps[0],), seed=sample.seed) if steps else None
        answer = extract_answer(
            prefix + text,
            self.question["options"],
            self.question["answer_type"],
        )
        if answer is None or not steps or num_steps + len(steps) > self.config.max_steps:
            return None
        return Continuation(tuple(steps), answer, seed=sample.seed)

    async def rollouts(self, steps: Sequence[str], n: int) -> list[bool]:
        """Whether each of `n` rollouts that ended with an answer is right; the others do not count, nor do answers that
        could not be graded.
        """
        question = self.question
        prefix = solution_prefix(steps)
        answers: list[str | None] = []
        for sample in await self._generate("rollout", steps, prefix, n):
            if sample.finish_reason != "stop":
                continue
            # With the prefix: an answer may be stated across the cut.
            answer = extract_answer(
                prefix + sample.text,
                question["options"],
                question["answer_type"],
            )
            answers.append(answer)
        grades = await self.grader.grade(question, answers)
        return [is_right for is_right in grades.right if is_right is not None]

    async def _generate(
        self, purpose: str, steps: Sequence[str], prefix: str, n: int, stop: str | None = None
    ) -> list[Completion]:
        """One request; nothing comes back where the steps have outgrown the model's length."""
        config = self.config
        seed = request_seed("writer", config.seed, *self.seed_parts, purpose, prefix)
        stops = () if stop is None else (stop,)
        sampling = Sampling(
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_tokens,
            stops,
        )
        prompt = replace(self.prompt, prefix=prefix)
        try:
            samples = await self.generator.generate(prompt, n, seed, sampling)
        except RowError:
            if not steps:  # the prompt alone is too long: a fault of the question
                raise
            return []
        # Rejected samples count too: they were paid for.
        for sample in samples:
            self.num_tokens += sample.num_tokens
        return samples
