"""Labels by Monte Carlo: continue a solution from a step several times and see how often the answer comes out right.

Enters: solutions, their questions, the judge's labels. Leaves: labels with source "monte_carlo" (`Labels`, nested by
question) for the steps that ran, the other steps empty; a question without such steps has an empty list. The value of
a step is about the prefix that ends there: num_correct / num_rollouts, and the label is 1 where it exceeds `threshold`.
A continuation that states no answer is not wrong: it is not counted. No prompt carries the gold answer.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from medmm_ray.config import digest
from medmm_ray.engines.generator import (
    MAX_DRAWS,
    Completion,
    Generator,
    GeneratorConfig,
    MakeGenerator,
    Prompt,
    Sampling,
    actor_options,
    policy_prompt,
    request_seed,
)
from medmm_ray.records import Labels, StepLabel, arrow_schema
from medmm_ray.tables import RowError, attach
from medmm_ray.text import extract_answer, is_correct

if TYPE_CHECKING:
    from ray.data import Dataset


class MonteCarloConfig(GeneratorConfig):
    """Which steps are continued, and how."""

    mode: Literal["uncertain"] = "uncertain"
    """uncertain: the steps in which the judge's confidence is low."""
    splits: tuple[str, ...] = ("train",)
    """Splits whose solutions are continued."""
    max_share: float = Field(0.1, ge=0, le=1)
    """Most steps of a question that are continued, as a share of all its steps."""
    num_rollouts: int = Field(4, ge=1, le=MAX_DRAWS)
    """Continuations of each prefix (VisualPRM: 16)."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """A prefix is right where num_correct / num_rollouts exceeds this (0 beat all higher ones in VisualPRM)."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    top_k: int = Field(50, ge=0)
    """Tokens to draw from, most likely first; 0 takes all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass to draw from."""
    max_tokens: int = Field(1024, ge=1)
    """Longest continuation, tokens."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt; as in sampling."""
    seed: int = 0
    """Start of all random numbers."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens)


@dataclass(frozen=True)
class Step:
    """One step of one of a question's solutions."""

    solution: int
    index: int


def monte_carlo(
    ds: "Dataset",
    config: MonteCarloConfig,
    *,
    questions: pa.Table,
    judge_labels: pa.Table,
    model: str,
    policy: str,
    evidence: pa.Table | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels}``, labels a list of `Labels`.

    `judge_labels` needs question_id, solution_id and steps; `model` is the checkpoint that continues, `policy` what the
    annotator is called; `evidence` is needed where config.num_documents > 0.
    """
    ds = attach(ds, questions, "question_id", ["split", "question", "options", "answer", "answer_type"])
    ds = attach(ds, uncertain_steps(judge_labels), "question_id", ["uncertain"])
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    return ds.map_batches(
        Roller,
        fn_constructor_kwargs={"config": config, "model": model, "policy": policy, "generator": generator},
        **actor_options(config),
    )


def uncertain_steps(labels: pa.Table) -> pa.Table:
    """One row a question with `uncertain`, the list of {solution_id, step} where the confidence is low."""
    steps = labels["steps"].combine_chunks()
    starts = np.asarray(steps.offsets)[:-1]
    parents = np.asarray(pc.list_parent_indices(steps))
    flat = pc.list_flatten(steps)
    low = np.asarray(pc.fill_null(pc.equal(pc.struct_field(flat, "confidence"), "low"), False))
    rows = parents[low]
    index = np.arange(len(flat))[low] - (starts[rows] - steps.offsets[0].as_py())
    found = pa.table(
        {
            "question_id": labels["question_id"].take(pa.array(rows)),
            "solution_id": labels["solution_id"].take(pa.array(rows)),
            "step": pa.array(index, pa.int64()),
        }
    ).combine_chunks()
    found = found.sort_by([("question_id", "ascending"), ("solution_id", "ascending"), ("step", "ascending")])
    ids = found["question_id"].to_numpy(zero_copy_only=False)
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.array([], dtype=np.int64)
    pairs = pa.StructArray.from_arrays(
        [found["solution_id"].combine_chunks(), found["step"].combine_chunks()], names=["solution_id", "step"]
    )
    offsets = pa.array(np.append(first, len(ids)), pa.int32())
    return pa.table(
        {
            "question_id": pa.array(ids[first], pa.string()),
            "uncertain": pa.ListArray.from_arrays(offsets, pairs),
        }
    )


class Roller:
    """The actor: one engine that continues the chosen prefixes of each question of a batch."""

    def __init__(self, config: MonteCarloConfig, model: str, policy: str, generator: MakeGenerator = Generator) -> None:
        self.config = config
        self.generator = generator(model, config)
        shape = (config.num_rollouts, config.temperature, config.top_k, config.top_p, config.max_tokens)
        self.annotator = f"{policy}@{digest(policy, config.seed, config.num_documents, *shape)}"

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        labels = await asyncio.gather(*(self.label(row) for row in batch.to_pylist()))
        nested = [[asdict(label) for label in row] for row in labels]
        kind = pa.list_(pa.struct(list(arrow_schema(Labels))))
        yield pa.table({"question_id": batch["question_id"], "labels": pa.array(nested, kind)})

    async def label(self, row: Mapping[str, Any]) -> list[Labels]:
        """The labels of one question's solutions in which a step was chosen."""
        solutions = row["solutions"]
        if row["split"] not in self.config.splits or not row["uncertain"]:
            return []
        known, asked = choose(solutions, uncertain_of(row["uncertain"], solutions), self.config.max_share)
        found: dict[Step, StepLabel | RowError] = {
            step: known_label(bool(solutions[step.solution]["correct"]), self.config.threshold) for step in known
        }
        prompt = self.prompt(row)
        results = await asyncio.gather(*(self.roll(row, prompt, prefix) for prefix in asked))
        for steps, result in zip(asked.values(), results, strict=True):
            found |= dict.fromkeys(steps, result)
        return [
            self.labels(
                row["question_id"], solutions[number], {s.index: v for s, v in found.items() if s.solution == number}
            )
            for number in sorted({step.solution for step in found})
        ]

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        room = self.config.max_model_len - self.config.max_tokens
        return policy_prompt(self.generator, row, self.config.num_documents, room)

    async def roll(self, row: Mapping[str, Any], prompt: Prompt, prefix: str) -> StepLabel | RowError:
        """Continue one prefix `num_rollouts` times, as one request."""
        seed = request_seed("rollout", row["question_id"], self.annotator, prefix)
        try:
            asked = replace(prompt, said=prefix)
            samples = await self.generator.generate(asked, self.config.num_rollouts, seed, self.config.sampling)
        except RowError as fault:
            return fault
        return rollout_label(outcomes(prefix, samples, row), self.config.threshold)

    def labels(
        self, question_id: str, solution: Mapping[str, Any], found: Mapping[int, StepLabel | RowError]
    ) -> Labels:
        faults = [value for value in found.values() if isinstance(value, RowError)]
        ran = {index: value for index, value in found.items() if isinstance(value, StepLabel)}
        return Labels(
            question_id=question_id,
            solution_id=solution["solution_id"],
            source="monte_carlo",
            annotator=self.annotator,
            steps=[ran.get(index, StepLabel()) for index in range(len(solution["steps"]))],
            cost=0.0,
            error=str(faults[0]) if faults else None,
        )


def uncertain_of(pairs: Iterable[Mapping[str, Any]], solutions: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Pairs of {solution_id, step} as places in `solutions`."""
    places = {solution["solution_id"]: number for number, solution in enumerate(solutions)}
    return [Step(places[pair["solution_id"]], pair["step"]) for pair in pairs]


def choose(
    solutions: Sequence[Mapping[str, Any]], uncertain: Sequence[Step], max_share: float
) -> tuple[list[Step], dict[str, list[Step]]]:
    """Which uncertain steps are known without a rollout, and which prefixes to continue for which steps.

    A final step whose answer was extracted is known: the outcome is its value. Equal prefixes are continued once. At
    most `max_share` of all steps of the question are labelled by rollouts, in an order that depends on the texts alone.
    """
    known: list[Step] = []
    groups: dict[str, list[Step]] = {}
    for step in uncertain:
        solution = solutions[step.solution]
        if step.index == len(solution["steps"]) - 1 and solution["correct"] is not None:
            known.append(step)
        else:
            groups.setdefault(prefix_text(solution["steps"], step.index), []).append(step)
    room = int(max_share * sum(len(solution["steps"]) for solution in solutions) + 1e-9)
    asked: dict[str, list[Step]] = {}
    for prefix in sorted(groups, key=digest):
        if len(groups[prefix]) <= room:
            room -= len(groups[prefix])
            asked[prefix] = groups[prefix]
    return known, asked


def prefix_text(steps: Sequence[str], index: int) -> str:
    """The solution up to step `index` (from 0), with the next step's mark, so that another step must follow."""
    marked = [f"Step {number}: {step}\n" for number, step in enumerate(steps[: index + 1], 1)]
    return "".join(marked) + f"Step {index + 2}:"


def outcomes(prefix: str, samples: Sequence[Completion], question: Mapping[str, Any]) -> list[bool]:
    """Whether each continuation that ended with an answer is right; cut-off and answerless ones are left out."""
    found = []
    for sample in samples:
        if sample.finish_reason == "stop":
            answer = extract_answer(prefix + sample.text, question["options"], question["answer_type"])
            right = is_correct(answer, question["answer"], question["answer_type"])
            found += [] if right is None else [right]
    return found


def rollout_label(right: Sequence[bool], threshold: float) -> StepLabel:
    """The label of a prefix from its counted continuations; no label where none counts."""
    if not right:
        return StepLabel(num_correct=0, num_rollouts=0)
    value = sum(right) / len(right)
    return StepLabel(
        label=int(value > threshold),
        value=value,
        num_correct=sum(right),
        num_rollouts=len(right),
        stopped_early=False,
    )


def known_label(correct: bool, threshold: float) -> StepLabel:
    """The label of a final step: nothing is left to roll out."""
    value = float(correct)
    return StepLabel(label=int(value > threshold), value=value, num_correct=0, num_rollouts=0, stopped_early=False)
