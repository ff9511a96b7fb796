"""Solutions of questions, drawn from a policy by vLLM.

Enters: questions (and their documents, where the prompt carries some). Leaves: one `Solutions` row a question. A sample
is kept if the model ended it, it has `min_steps` to `max_steps` steps and states an answer. Where samples are refused,
further ones are drawn in rounds; a question that still cannot be filled keeps what it has (`num_requested` says what
was asked). Draw i of a question has the seed of the question + i and `index` i, so a retry or another batch gives the
same solutions.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import digest
from medmm_ray.engines.generator import (
    MAX_DRAWS,
    Completion,
    Generator,
    GeneratorConfig,
    MakeGenerator,
    Sampling,
    actor_options,
    policy_prompt,
    request_seed,
)
from medmm_ray.records import Solution, Solutions, to_arrow
from medmm_ray.tables import RowError, attach
from medmm_ray.text import extract_answer, is_correct, split_steps

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger(__name__)


class SampleConfig(GeneratorConfig):
    """How solutions are drawn; the defaults are Med-PRM's."""

    num_samples_train: int = Field(16, ge=1, le=MAX_DRAWS)
    """Solutions a question of the training (and validation) split."""
    num_samples_test: int = Field(64, ge=1, le=MAX_DRAWS)
    """Solutions a question of the test split."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    top_k: int = Field(50, ge=0)
    """Tokens to draw from, most likely first; 0 takes all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass to draw from."""
    max_tokens: int = Field(1024, ge=1)
    """Longest solution, tokens; one that is cut there is refused."""
    min_steps: int = Field(3, ge=1)
    """Fewest steps of a solution that is kept."""
    max_steps: int = Field(9, ge=1)
    """Most steps of a solution that is kept."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt; one that does not fit max_model_len is left out."""
    max_rounds: int = Field(3, ge=1)
    """Rounds of drawing: the first draws what is asked, the others replace what was refused."""
    oversample: float = Field(3.0, ge=1)
    """Draws a missing solution, in the rounds after the first."""
    fill_up: bool = False
    """Fill a question up with refused solutions where too few are good: every question then has what it asked for."""
    seed: int = 0
    """Start of all random numbers."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens)


def sample(
    ds: "Dataset",
    config: SampleConfig,
    *,
    model: str,
    policy: str,
    config_hash: str,
    evidence: pa.Table | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """Questions -> `Solutions` rows.

    `model` is the checkpoint that draws, `policy` what solution ids call it, `config_hash` the table's fingerprint.
    `evidence` (question_id, documents) is needed where config.num_documents > 0.
    """
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    return ds.map_batches(
        Sampler,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "config_hash": config_hash,
            "generator": generator,
        },
        **actor_options(config),
    )


class Sampler:
    """The actor: one engine, all samples of a question on it."""

    def __init__(
        self, config: SampleConfig, model: str, policy: str, config_hash: str, generator: MakeGenerator = Generator
    ) -> None:
        self.config, self.policy, self.config_hash = config, policy, config_hash
        self.generator = generator(model, config)
        self.num_questions = 0

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = await asyncio.gather(*(self.solve(question) for question in batch.to_pylist()))
        self.num_questions += len(rows)
        done = self.generator.statistics
        log.info(
            "sample: %d questions, %d tokens, prefix cache hit rate %.3f",
            self.num_questions, done.output_tokens, done.hit_rate,
        )  # fmt: skip
        yield to_arrow(Solutions, list(rows))

    async def solve(self, question: Mapping[str, Any]) -> Solutions:
        """All solutions of one question; a fault becomes the row's error."""
        config = self.config
        wanted = config.num_samples_test if question["split"] == "test" else config.num_samples_train
        kept: list[Solution] = []
        refused: list[Solution] = []
        error = None if question["error"] is None else f"upstream: {question['error']}"
        if error is None:
            try:
                kept, refused = await self.draw(question, wanted)
            except RowError as fault_:
                error = str(fault_)
        solutions = kept[:wanted]
        if config.fill_up:
            spare = [s for s in refused if s.steps][: wanted - len(solutions)]
            solutions = sorted([*solutions, *spare], key=lambda s: s.index)
        return Solutions(
            question_id=question["question_id"],
            policy=self.policy,
            config_hash=self.config_hash,
            num_requested=wanted,
            num_rejected=len(refused),
            solutions=solutions,
            error=error,
        )

    async def draw(self, question: Mapping[str, Any], wanted: int) -> tuple[list[Solution], list[Solution]]:
        """Kept and refused solutions, round after round until `wanted` are kept or the rounds are over."""
        config = self.config
        seed = request_seed(question["question_id"], self.config_hash, config.seed)
        room = config.max_model_len - config.max_tokens
        prompt = policy_prompt(self.generator, question, config.num_documents, room)
        kept: list[Solution] = []
        refused: list[Solution] = []
        for round_ in range(config.max_rounds):
            drawn = len(kept) + len(refused)
            num = draws(wanted - len(kept), round_, config.oversample, MAX_DRAWS - drawn)
            if not num:
                break
            for completion in await self.generator.generate(prompt, num, seed + drawn, config.sampling):
                made = self.solution(question, completion, completion.seed - seed)
                good = fault(made, config.min_steps, config.max_steps) is None
                (kept if good else refused).append(made)
        return kept, refused

    def solution(self, question: Mapping[str, Any], completion: Completion, index: int) -> Solution:
        answer_type = question["answer_type"]
        _, steps = split_steps(completion.text)
        answer = extract_answer(completion.text, question["options"], answer_type)
        return Solution(
            solution_id="s" + digest(question["question_id"], self.policy, self.config_hash, index),
            index=index,
            text=completion.text,
            steps=steps,
            answer=answer,
            correct=is_correct(answer, question["answer"], answer_type),
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            text_sha=digest(completion.text),
        )


def draws(missing: int, round_: int, oversample: float, left: int) -> int:
    """How many samples a round draws for `missing` solutions, of `left` that may be drawn at all."""
    return max(0, min(left, missing if round_ == 0 else math.ceil(missing * oversample)))


def fault(solution: Solution, min_steps: int, max_steps: int) -> str | None:
    """Why the quality filter refuses a solution: cut_off, num_steps or no_answer; None keeps it."""
    if solution.finish_reason != "stop":
        return "cut_off"
    if not min_steps <= len(solution.steps) <= max_steps:
        return "num_steps"
    return "no_answer" if solution.answer is None else None
