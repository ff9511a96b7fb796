"""Solutions of questions, sampled from a policy by vLLM or an API.

Enters: questions (and their documents and images, where the prompt carries some). Leaves: one `Solutions` row a
question. `quality.fault` says which samples are kept. Where samples are refused, further ones are generated in rounds;
a question that still cannot be filled keeps what it has, and `num_missing` and `rejected` say so. Sample i of a
question has the seed of the question + i and `index` i, so a retry or another batch gives the same solutions. Samples
that an API did not give are refused ones; only a question whose first round brought none has their fault as its error.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import pyarrow as pa
from pydantic import Field, model_validator

from medmm_ray.config import Config, digest
from medmm_ray.data.records import Count, Solution, Solutions, to_arrow
from medmm_ray.data.sorted_rows import SortedRows, rows_among
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.generator import (
    MAX_SAMPLES,
    Completion,
    Generator,
    MakeGenerator,
    Sampling,
    TextGenerator,
    candidate_documents,
    policy_prompt,
    request_seed,
)
from medmm_ray.engines.grader import EquivalenceConfig, Grader, Grades, MakeGrader
from medmm_ray.engines.images import open_image
from medmm_ray.engines.llm.access import Access, Apis
from medmm_ray.engines.llm.client import ApiEngine
from medmm_ray.engines.llm.policy import ApiPolicy
from medmm_ray.engines.llm.served import joined_names
from medmm_ray.engines.vllm_engine import ActorPool, VllmEngine, actor_options
from medmm_ray.estimate import BYTES_PER_TOKEN, Line, Sizes
from medmm_ray.text import extract_answer, split_steps
from medmm_ray.text.quality import FAULTS, fault

if TYPE_CHECKING:
    from PIL.Image import Image
    from ray.data import Dataset

VERSION = 4  # of what a step makes: raise it when the same config makes something else
DRAWN_PER_KEPT = 1.25  # samples, with Med-PRM's filter of 3 to 9 steps; what the estimate assumes


class PolicyApi(ApiEngine, ActorPool):
    """A policy behind an API, by the name in models.policy."""

    num_images: int = Field(0, ge=0)
    """Images of a question in the prompt, its first ones; 0: text only."""
    max_prompt_tokens: int = Field(100_000, ge=16)
    """Room for documents in the prompt, tokens (estimated, an image as it is billed: 36,835 by gpt-4o-mini)."""


class SampleConfig(Config):
    """How solutions are sampled (the defaults are Med-PRM's), and the engine that generates them."""

    engine: Annotated[VllmEngine | PolicyApi, Field(discriminator="kind")] = VllmEngine()
    """What runs the policy."""
    num_samples_train: int = Field(16, ge=1, le=MAX_SAMPLES)
    """Solutions per question of the training (and validation) split."""
    num_samples_test: int = Field(64, ge=1, le=MAX_SAMPLES)
    """Solutions per question of the test split."""
    temperature: float | None = Field(0.7, ge=0)
    """Sampling temperature; null leaves it to an API's model (reasoning models take no other)."""
    top_k: int = Field(50, ge=0)
    """Tokens to sample from, most likely first; 0 takes all, as every API does."""
    top_p: float | None = Field(1.0, gt=0, le=1)
    """Probability mass to sample from; null leaves it to an API's model."""
    max_tokens: int = Field(1024, ge=1)
    """Longest solution, tokens; one that is cut there is refused."""
    min_steps: int = Field(3, ge=1)
    """Fewest steps of a solution that is kept."""
    max_steps: int = Field(9, ge=1)
    """Most steps of a solution that is kept."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt; one that does not fit the engine's max_model_len (an API:
    max_prompt_tokens) is left out, and the figures say how many were."""
    max_rounds: int = Field(3, ge=1)
    """Rounds of sampling: the first has the samples asked for, the others replace what was refused."""
    oversample: float = Field(3.0, ge=1)
    """Samples for each missing solution, in the rounds after the first."""
    fill_up: bool = False
    """Fill a question up with refused solutions where too few are good, so that it has as many as asked for."""
    seed: int = 0
    """Start of all random numbers."""

    equivalence: EquivalenceConfig = EquivalenceConfig()
    """How open answers are graded, here, in Monte Carlo and in tree search."""

    @model_validator(mode="after")
    def _keeps_something(self) -> "SampleConfig":
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps is {self.min_steps} and max_steps {self.max_steps}: no solution can be kept")
        return self

    @model_validator(mode="after")
    def _suits_the_engine(self) -> "SampleConfig":
        if self.engine.kind == "vllm":
            # An engine takes numbers; null means what the model behind an API has as its own.
            if self.temperature is None or self.top_p is None:
                raise ValueError("temperature and top_p may be null for an API alone; set numbers for engine.kind=vllm")
        elif self.top_k and "top_k" in self.model_fields_set:
            raise ValueError(f"engine.kind is {self.engine.kind!r}, and no API takes top_k={self.top_k}; set top_k=0")
        return self

    @property
    def prompt_room(self) -> int:
        """Tokens of a prompt with documents, at most."""
        if isinstance(self.engine, VllmEngine):
            return self.engine.max_model_len - self.max_tokens
        return self.engine.max_prompt_tokens

    @property
    def sampling(self) -> Sampling:
        """How the policy is sampled."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens)


def sample_cost(config: SampleConfig, sizes: Sizes) -> Line:
    """The line of sampling, before it runs."""
    policy = sizes.policy
    samples = sizes.solutions * DRAWN_PER_KEPT
    # The prefix cache of an engine takes in a question once for all of its samples; an API is sent it for each.
    is_api = isinstance(config.engine, PolicyApi)
    input_tokens = (samples if is_api else sizes.questions) * sizes.prefix_tokens(config.num_documents)
    output_tokens = samples * sizes.solution_tokens
    return Line(
        step="sample",
        work=f"{sizes.solutions:,} solutions kept of {samples:,.0f}",
        calls=samples if is_api else 0,
        tokens=input_tokens + output_tokens,
        dollars=policy.dollars(input_tokens, output_tokens),
        gpu_hours=policy.gpu_hours(sizes.hardware, input_tokens, output_tokens),
        stored=sizes.solutions * sizes.solution_tokens * BYTES_PER_TOKEN,
    )


def sample(
    ds: "Dataset",
    config: SampleConfig,
    *,
    model: str,
    policy: str,
    config_hash: str,
    evidence: pa.Table | SortedRows | None = None,
    images: pa.Table | SortedRows | None = None,
    apis: Apis | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """Questions -> `Solutions` rows, with figures of each.

    `model` is the checkpoint (or the API's model) that generates, `policy` what solution ids call it, `config_hash` the
    table's fingerprint. `evidence` (question_id, documents) is needed where config.num_documents > 0, `images`
    (image_id, uri) where engine.num_images > 0; both may be `SortedRows`, of which each task reads what it needs.
    `apis` is how the run reaches models behind APIs.
    """
    engine = config.engine
    if engine.num_images and images is None:
        raise ValueError(f"num_images={engine.num_images} needs the table images")
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    access: Access | None = None
    if isinstance(engine, PolicyApi):
        if apis is None:
            raise ValueError(f"sample.engine.kind={engine.kind} needs a folder for its answers")
        access = apis.open(engine, model)
    return ds.map_batches(
        SamplingActor,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "config_hash": config_hash,
            "images": images,
            "generator": generator,
            "grader": MakeGrader(config.equivalence, apis),
            "access": access,
        },
        **actor_options(engine),
    )


@dataclass
class QuestionSamples:
    """The samples of a question so far: solutions accepted and refused, in their order, and the reasons."""

    accepted: list[Solution] = field(default_factory=list)
    refused: list[Solution] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    completions: list[Completion] = field(default_factory=list)
    grades: list[Grades] = field(default_factory=list)  # one a round
    documents_shown: int = 0
    documents_left_out: int = 0

    def add(self, solution: Solution, fault: str | None) -> None:
        """Take a solution: accepted, or refused for a fault."""
        if fault is None:
            self.accepted.append(solution)
        else:
            self.refused.append(solution)
            self.faults[fault] += 1

    @property
    def rejected(self) -> list[Count]:
        """How many were refused for each reason."""
        counts: list[Count] = []
        # Sorted, so that a row is the same in whatever order the reasons came.
        for kind, count in sorted(self.faults.items()):
            counts.append(Count(kind=kind, count=count))
        return counts


class SamplingActor:
    """The actor: one engine, all samples of a question on it."""

    def __init__(
        self,
        config: SampleConfig,
        model: str,
        policy: str,
        config_hash: str,
        images: pa.Table | SortedRows | None = None,
        generator: MakeGenerator = Generator,
        grader: MakeGrader | None = None,
        access: Access | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.policy = policy
        self.config_hash = config_hash
        self.images = images
        self.generator: TextGenerator
        if access is not None:
            self.generator = ApiPolicy(access.connect())
        else:
            # A model behind an API comes with its access.
            self.generator = generator(model, cast(VllmEngine, config.engine))
        self.grader = grader() if grader else Grader()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows: list[Solutions] = []
        figures: list[dict[str, float]] = []
        results = await asyncio.gather(*map(self.solve, batch.to_pylist()))
        for row, samples in results:
            rows.append(row)
            figures.append(figures_of(row, samples))
        yield to_arrow(Solutions, rows).append_column("figures", pa.array(figures))

    async def solve(self, question: Mapping[str, Any]) -> tuple[Solutions, QuestionSamples]:
        """All solutions of one question, and all samples of it.

        A fault becomes the row's error; what was sampled before it is kept.
        """
        config = self.config
        num_requested = config.num_samples_test if question["split"] == "test" else config.num_samples_train
        samples = QuestionSamples()
        error = None if question["error"] is None else f"upstream: {question['error']}"
        if error is None:
            try:
                await self.sample(question, num_requested, samples)
            except RowError as row_error:
                error = str(row_error)
        solutions = samples.accepted[:num_requested]
        if config.fill_up:
            # One without steps cannot be scored.
            spare = [solution for solution in samples.refused if solution.steps]
            solutions += spare[: num_requested - len(solutions)]
            solutions.sort(key=lambda solution: solution.index)
        row = Solutions(
            question_id=question["question_id"],
            policy=self.policy,
            config_hash=self.config_hash,
            num_requested=num_requested,
            num_missing=num_requested - len(solutions),
            num_drawn=len(samples.completions),
            rejected=samples.rejected,
            cost=sum((completion.cost for completion in samples.completions), 0.0),
            solutions=solutions,
            answered_by=joined_names(completion.model for completion in samples.completions),
            error=error,
        )
        return row, samples

    async def sample(self, question: Mapping[str, Any], num_requested: int, samples: QuestionSamples) -> None:
        """Add to `samples`, round after round, until `num_requested` are accepted or the rounds are over."""
        config = self.config
        seed = self.seed(question["question_id"])
        image_ids = question["image_ids"][: config.engine.num_images]
        images = await self.open_images(image_ids)
        prompt = policy_prompt(
            self.generator,
            question,
            config.num_documents,
            config.prompt_room,
            images,
        )
        candidates = candidate_documents(question, config.num_documents)
        samples.documents_shown = prompt.num_documents
        samples.documents_left_out = len(candidates) - prompt.num_documents
        for round_number in range(config.max_rounds):
            num_done = len(samples.completions)
            missing = num_requested - len(samples.accepted)
            # Seeds of a question end at MAX_SAMPLES: beyond are those of another.
            num = round_size(missing, round_number, config.oversample, MAX_SAMPLES - num_done)
            if not num:
                break
            completions = await self.generator.generate(prompt, num, seed + num_done, config.sampling)
            first_fault = completions[0].fault
            # Later rounds keep what the earlier ones brought.
            if not num_done and first_fault and all(completion.fault for completion in completions):
                raise first_fault
            await self.add(question, seed, completions, samples)

    async def add(
        self, question: Mapping[str, Any], seed: int, completions: Sequence[Completion], samples: QuestionSamples
    ) -> None:
        """Grade a round's completions and add them to `samples`."""
        config = self.config
        solutions = [self.solution(question, completion, completion.seed - seed) for completion in completions]
        grades = await self.grader.grade(question, [solution.answer for solution in solutions])
        samples.grades.append(grades)
        samples.completions += completions
        for ungraded, correct in zip(solutions, grades.right, strict=True):
            solution = replace(ungraded, correct=correct)
            reason = fault(
                solution.text,
                solution.steps,
                solution.answer,
                solution.finish_reason,
                config.min_steps,
                config.max_steps,
            )
            samples.add(solution, reason)

    def seed(self, question_id: str) -> int:
        """The seed of a question's first sample.

        An API's answers are kept under their seeds, beside all that shapes the request: so the seed is that of the
        question alone, and a change of what is asked for or kept, which the fingerprint tells, pays no answer again.
        """
        # An engine's samples cost nothing to repeat; the fingerprint keeps those of two tables apart.
        sampled_by = self.config_hash if self.config.engine.kind == "vllm" else self.model
        return request_seed(question_id, sampled_by, self.config.seed)

    async def open_images(self, image_ids: Sequence[str]) -> "list[Image]":
        """The opened images; one that cannot be opened is the row's error."""
        if not image_ids:
            return []
        assert self.images is not None, "`sample` asks for the table"
        rows = rows_among(self.images, "image_id", image_ids)
        uris = [rows[image_id]["uri"] for image_id in image_ids]
        # In threads: the engine's requests go on meanwhile.
        requests = [asyncio.to_thread(open_image, uri) for uri in uris]
        return list(await asyncio.gather(*requests))

    def solution(self, question: Mapping[str, Any], completion: Completion, index: int) -> Solution:
        """The record of sample `index` of a question, not yet graded."""
        answer_type = question["answer_type"]
        _, steps = split_steps(completion.text)
        answer = extract_answer(completion.text, question["options"], answer_type)
        return Solution(
            solution_id="s" + digest(question["question_id"], self.policy, self.config_hash, index),
            index=index,
            text=completion.text,
            steps=steps,
            answer=answer,
            correct=None,
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            text_sha=digest(completion.text),
        )


def round_size(missing: int, round_number: int, oversample: float, most: int) -> int:
    """How many samples a round (from 0) has for `missing` solutions, of at most `most`."""
    num = missing
    if round_number > 0:
        # The question has shown that some of its samples are refused.
        num = math.ceil(missing * oversample)
    return max(0, min(most, num))


def figures_of(row: Solutions, samples: QuestionSamples) -> dict[str, float]:
    """What a row adds to its table's figures: samples, those refused by reason, questions not filled, tokens, dollars,
    answers that a model was asked to grade and those that it did not, documents that the prompt holds and those that it
    had no room for.

    Of the prompt tokens, all samples but the first can find the cacheable ones in the prefix cache.
    """
    figures: dict[str, float] = {
        "samples_requested": row.num_requested,
        "samples_missing": row.num_missing,
        "samples_drawn": row.num_drawn,
    }
    for kind in FAULTS:
        figures[f"rejected_{kind}"] = samples.faults[kind]
    figures |= {
        "unfilled_questions": int(row.num_missing > 0 and row.error is None),
        "prompt_tokens": 0,
        "cacheable_tokens": 0,
        "cached_tokens": 0,
        "output_tokens": 0,
        "cost_usd": row.cost,
        "answers_asked": 0,
        "answers_unanswered": 0,
        "documents_shown": samples.documents_shown,
        "documents_left_out": samples.documents_left_out,
    }
    for number, completion in enumerate(samples.completions):
        figures["prompt_tokens"] += completion.prompt_tokens
        figures["cached_tokens"] += completion.cached_tokens
        figures["output_tokens"] += completion.num_tokens
        if number > 0:  # the first one fills the cache
            figures["cacheable_tokens"] += completion.shareable_tokens
    for grades in samples.grades:
        figures["answers_asked"] += grades.asked
        figures["answers_unanswered"] += grades.unanswered
    # Floats all: Arrow takes a column's type from each block alone.
    for name, figure in figures.items():
        figures[name] = float(figure)
    return figures
