"""Labels by Monte Carlo: continue a solution from a step several times and see how often the answer comes out right.

Enters: solutions, their questions, the judge's labels. Leaves: labels with source "monte_carlo" (`Labels`, nested by
question) for the steps that are known, the other steps empty; a question without such steps has an empty list. The
value of a step is about the prefix that ends there: num_correct / num_rollouts, and the label is 1 where it exceeds
`threshold`. A continuation that is cut off or states no answer is not wrong: it is not counted, and a prefix of which
none counts has a reason and no label. So has one that could not be continued; only where no step of a solution has a
label is that its row's error. No prompt carries the gold answer. `search` says what is continued and why.

With `stop_early` (the default) a prefix is continued 2, 2, 4, 8 ... times and only until its label is decided. The
label is the same, at a fraction of the tokens, but num_correct / num_rollouts is then too high (a true .25 reads .37,
and would read .46 one by one), so such rows are marked, and targets that need the ratio refuse them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from medmm_ray.config import Splits, digest, identity
from medmm_ray.data.records import Labels, StepLabel, to_arrow_lists
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import (
    MAX_SAMPLES,
    Completion,
    Generator,
    GeneratorConfig,
    MakeGenerator,
    Sampling,
    actor_options,
    policy_prompt,
    request_seed,
)
from medmm_ray.engines.grader import EquivalenceConfig, Grader, MakeGrader
from medmm_ray.engines.images import open_image
from medmm_ray.steps.monte_carlo.search import (
    LabelRule,
    QuestionRollouts,
    RolloutCounts,
    SolutionPrefixes,
    answers,
    first_wrong,
    labelled,
    outcome_of,
    prefix_texts,
    uncertain_steps,
    wanted,
    within_share,
)

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 3  # of what a step makes: raise it when the same config makes something else
log = logging.getLogger(__name__)


class MonteCarloConfig(GeneratorConfig):
    """Which steps are continued, and how."""

    mode: Literal["uncertain", "all", "first_error", "verify"] = "uncertain"
    """uncertain: the steps in which the judge's confidence is low, or two judges differ; all: every step (VisualPRM);
    first_error: a binary search for the first wrong step (OmegaPRM); verify: the two steps around the judge's first
    wrong one."""
    splits: Splits = ("train",)
    """Splits whose solutions are continued."""
    max_solutions: int | None = Field(None, ge=1)
    """Most solutions of a question that are looked at, the first by index; null takes all."""
    wrong_only: bool = False
    """Look only at solutions whose answer is wrong."""
    max_share: float = Field(0.1, ge=0, le=1)
    """uncertain: most steps of a question that are continued, as a share of all its steps."""
    num_rollouts: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    """Continuations of each prefix; null: 4 in mode uncertain (MedMM), else 16 (VisualPRM)."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """A prefix is right where num_correct / num_rollouts exceeds this (0 beat all higher ones in VisualPRM)."""
    stop_early: bool = True
    """Stop when a label is decided; false where the policies soft or advantage shall train on the ratios."""
    search_from: Literal["middle", "judge"] = "middle"
    """first_error: where the search begins: in the middle, or at the two steps around the judge's first wrong one."""
    count_solutions: bool = True
    """all, unless wrong_only: count the question's own solutions through a prefix as continuations of it, as long as
    sample draws as monte_carlo does."""
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

    @model_validator(mode="after")
    def _searches_for_nothing_but_zero(self) -> "MonteCarloConfig":
        if self.searches and self.threshold:
            raise ValueError(
                f"mode {self.mode} needs threshold 0, not {self.threshold:g}: that the answer can be reached from a "
                "step says the same of all steps before it, that it is reached often does not; take mode all"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens)

    @property
    def rollouts(self) -> int:
        """Continuations of each prefix."""
        return self.num_rollouts or (4 if self.mode == "uncertain" else 16)

    @property
    def searches(self) -> bool:
        return self.mode in ("first_error", "verify")

    @property
    def counts_solutions(self) -> bool:
        """Whether the question's own solutions are counted; elsewhere the choice of prefixes would bias the ratio."""
        return self.count_solutions and self.mode == "all" and not self.wrong_only

    @property
    def asks_judge(self) -> bool:
        """Whether the judge's first wrong step says where to look."""
        return self.mode == "verify" or (self.mode == "first_error" and self.search_from == "judge")


def monte_carlo(
    ds: "Dataset",
    config: MonteCarloConfig,
    *,
    questions: pa.Table,
    judge_labels: pa.Table,
    model: str,
    policy: str,
    evidence: pa.Table | None = None,
    images: pa.Table | None = None,
    equivalence: EquivalenceConfig | None = None,
    folder: str | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels, figures}``, labels a list of `Labels`.

    `judge_labels` needs question_id, solution_id, annotator, steps and error; `model` is the checkpoint that continues,
    `policy` what the annotator is called; `evidence` is needed where config.num_documents > 0, `images` (image_id, uri)
    where config.num_images > 0. `equivalence` grades open answers as in sampling; `folder` is where the run keeps what
    its model said.
    """
    ds = attach(ds, questions, "question_id", ["split", "question", "options", "answer", "answer_type"])
    ds = attach(ds, by_question(judge_labels), "question_id", ["judged"])
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    if config.num_images:
        if images is None:
            raise ValueError(f"num_images={config.num_images} needs the table images")
        ds = attach(ds, image_uris(questions, images, config.num_images), "question_id", ["image_uris"])
    return ds.map_batches(
        RolloutActor,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "generator": generator,
            "grader": MakeGrader(equivalence or EquivalenceConfig(), folder),
        },
        **actor_options(config),
    )


def by_question(labels: pa.Table) -> pa.Table:
    """One row a question with `judged`: its labels rows without an error, each step as {label, confidence}."""
    labels = labels.filter(pc.is_null(labels["error"])).combine_chunks()
    labels = labels.sort_by([(name, "ascending") for name in ("question_id", "solution_id", "annotator")])
    lists = labels["steps"].combine_chunks()
    flat = lists.flatten()
    steps = pa.StructArray.from_arrays(
        [pc.struct_field(flat, name) for name in ("label", "confidence")], names=["label", "confidence"]
    )
    lengths = np.asarray(pc.list_value_length(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    rows = pa.StructArray.from_arrays(
        [labels["solution_id"].combine_chunks(), pa.ListArray.from_arrays(offsets, steps)],
        names=["solution_id", "steps"],
    )
    ids, first = np.unique(labels["question_id"].to_numpy(), return_index=True)
    starts = pa.array(np.append(first, labels.num_rows), pa.int32())
    return pa.table({"question_id": pa.array(ids, pa.string()), "judged": pa.ListArray.from_arrays(starts, rows)})


def image_uris(questions: pa.Table, images: pa.Table, num_images: int) -> pa.Table:
    """One row a question with the uris of its first `num_images` images."""
    uris = dict(zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True))
    shown = [[uris[i] for i in ids[:num_images]] for ids in questions["image_ids"].to_pylist()]
    return pa.table({"question_id": questions["question_id"], "image_uris": pa.array(shown, pa.list_(pa.string()))})


class RolloutActor:
    """The actor: one engine that continues the chosen prefixes of each question of a batch."""

    def __init__(
        self, config: MonteCarloConfig, model: str, policy: str, generator: MakeGenerator = Generator,
        grader: MakeGrader | None = None,
    ) -> None:  # fmt: skip
        self.config, self.policy = config, policy
        self.grader = grader() if grader else Grader()
        self.generator = generator(model, config)
        self.annotator = f"{policy}@{digest(policy, identity(config))}"
        # A prefix is continued alike in all modes: the k-th continuation has the same seed.
        shape = (config.temperature, config.top_k, config.top_p, config.max_tokens)
        self.draws = (policy, config.seed, config.num_documents, config.num_images, *shape)
        self.num_questions = 0

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        done = await asyncio.gather(*(self.label(row) for row in batch.to_pylist()))
        self.num_questions += len(done)
        statistics = self.generator.statistics
        log.info(
            "monte_carlo: %d questions, %d tokens, prefix cache hit rate %.3f",
            self.num_questions, statistics.output_tokens, statistics.hit_rate,
        )  # fmt: skip
        yield pa.table(
            {
                "question_id": batch["question_id"],
                "labels": to_arrow_lists(Labels, [labels for labels, _ in done]),
                "figures": pa.array([figures for _, figures in done]),
            }
        )

    async def label(self, row: Mapping[str, Any]) -> tuple[list[Labels], dict[str, int]]:
        """The labels of one question's chosen solutions, and what they took."""
        config = self.config
        rule = LabelRule(config.rollouts, config.threshold, config.stop_early)
        findings = QuestionRollouts(rule, share_reached=not config.threshold and (config.stop_early or config.searches))
        chains = self.chains(row) if row["split"] in config.splits else []
        if chains and row["policy"] == self.policy:
            self.use_solutions(row["solutions"], findings)
        if config.mode == "uncertain":
            num_steps = sum(len(solution["steps"]) for solution in row["solutions"])
            chains = within_share(chains, findings, int(config.max_share * num_steps + 1e-9))
        await self.explore(row, chains, findings)
        found = [(chain, labelled(chain, findings, config.mode)) for chain in chains]
        labels = [self.labels(row, chain, steps, findings) for chain, steps in found if steps]
        return labels, figures(findings, [step for _, steps in found for step in steps.values()])

    def chains(self, row: Mapping[str, Any]) -> list[SolutionPrefixes]:
        """The solutions that are looked at, with the judge's word on them."""
        config = self.config
        judged: dict[str, list[Mapping[str, Any]]] = {}
        for verdict in row["judged"] or []:
            judged.setdefault(verdict["solution_id"], []).append(verdict)
        chosen = sorted(enumerate(row["solutions"]), key=lambda pair: pair[1]["index"])[: config.max_solutions]
        chains = []
        for number, solution in chosen:
            outcome, verdicts = outcome_of(solution), judged.get(solution["solution_id"], [])
            if config.wrong_only and outcome is not False:
                continue
            guess = first_wrong(verdicts[0]["steps"]) if config.asks_judge and verdicts else None
            steps = uncertain_steps(verdicts) if config.mode == "uncertain" else tuple(range(len(solution["steps"])))
            if steps:
                chains.append(SolutionPrefixes(number, prefix_texts(solution["steps"]), outcome, guess, steps))
        return chains

    def use_solutions(self, solutions: Sequence[Mapping[str, Any]], findings: QuestionRollouts) -> None:
        """Take what the solutions of this policy show of their own prefixes."""
        ends = [(prefix_texts(solution["steps"]), outcome_of(solution)) for solution in solutions]
        if self.config.counts_solutions:
            findings.count_solutions(ends)
        for prefixes, outcome in ends:
            if outcome:
                findings.reach(prefixes[:-1])

    async def explore(
        self, row: Mapping[str, Any], chains: Sequence[SolutionPrefixes], findings: QuestionRollouts
    ) -> None:
        """Continue prefixes, round by round, until every label is known that is wanted."""
        shorter = {chain.prefixes[i]: chain.prefixes[: i + 1] for chain in chains for i in range(len(chain.prefixes))}
        due = wanted(chains, findings, self.config.mode)
        try:
            prompt = await self.prompt(row) if due else ChatPrompt([])
        except RowError as fault:  # an image that cannot be opened
            findings.faults |= dict.fromkeys(due, fault)
            return
        while due:
            drawn = await asyncio.gather(*(self.roll(row, prompt, p, num, findings) for p, num in due.items()))
            for prefix, samples in zip(due, drawn, strict=True):
                if isinstance(samples, RowError):
                    findings.faults[prefix] = samples
                    continue
                tally = findings.tallies.setdefault(prefix, RolloutCounts())
                grades = await self.grader.grade(row, answers(prefix, samples, row))
                findings.grades.append(grades)
                tally.drawn += len(samples)
                tally.cut_off += sum(sample.finish_reason != "stop" for sample in samples)
                tally.add(grades.right)
                findings.num_tokens += sum(sample.num_tokens for sample in samples)
                findings.prompt_tokens += sum(sample.prompt_tokens for sample in samples)
                findings.cached_tokens += sum(sample.cached_tokens for sample in samples)
                if self.config.searches and any(grades.right):
                    findings.reach(shorter[prefix])
            due = wanted(chains, findings, self.config.mode)

    async def prompt(self, row: Mapping[str, Any]) -> ChatPrompt:
        """What the policy is asked: as in sampling, with what it sees."""
        uris = row["image_uris"] if self.config.num_images else []
        pictures = await asyncio.gather(*(asyncio.to_thread(open_image, uri) for uri in uris))
        room = self.config.max_model_len - self.config.max_tokens
        return policy_prompt(self.generator, row, self.config.num_documents, room, pictures)

    async def roll(
        self, row: Mapping[str, Any], prompt: ChatPrompt, prefix: str, num: int, findings: QuestionRollouts
    ) -> list[Completion] | RowError:
        """Continue one prefix `num` times more, as one request."""
        seed = request_seed("rollout", row["question_id"], self.draws, prefix)
        drawn = findings.tallies[prefix].drawn if prefix in findings.tallies else 0
        try:
            return await self.generator.generate(
                replace(prompt, prefix=prefix), num, seed + drawn, self.config.sampling
            )
        except RowError as fault:
            return fault

    def labels(
        self,
        row: Mapping[str, Any],
        chain: SolutionPrefixes,
        steps: Mapping[int, StepLabel],
        findings: QuestionRollouts,
    ) -> Labels:
        solution = row["solutions"][chain.number]
        is_labelled = any(step.label is not None for step in steps.values())
        faults = [findings.faults[prefix] for prefix in chain.prefixes if prefix in findings.faults]
        return Labels(
            question_id=row["question_id"],
            solution_id=solution["solution_id"],
            source="monte_carlo",
            annotator=self.annotator,
            steps=[steps.get(index, StepLabel()) for index in range(len(solution["steps"]))],
            cost=0.0,
            error=str(faults[0]) if faults and not is_labelled else None,
        )


def figures(findings: QuestionRollouts, steps: Sequence[StepLabel]) -> dict[str, int]:
    """What a question took, for the manifest: continuations, their tokens, those that do not count, prefixes that could
    not be continued, the labels, and answers that a model was asked to grade and those that it did not."""
    tallies = findings.tallies.values()
    return {
        "rollouts": sum(tally.drawn for tally in tallies),
        "rollout_tokens": findings.num_tokens,
        "prompt_tokens": findings.prompt_tokens,
        "cached_tokens": findings.cached_tokens,
        "failed_rollouts": sum(tally.drawn + tally.known - tally.counted for tally in tallies),
        "prefixes_continued": sum(tally.drawn > 0 for tally in tallies),
        "prefixes_failed": len(findings.faults),
        "steps_labelled": sum(step.label is not None for step in steps),
        "steps_known_free": sum(step.label is not None and not step.num_rollouts for step in steps),
        "answers_asked": sum(grades.asked for grades in findings.grades),
        "answers_unanswered": sum(grades.unanswered for grades in findings.grades),
    }
