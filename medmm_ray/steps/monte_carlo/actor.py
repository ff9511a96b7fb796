"""The rollouts themselves: an engine in an actor that continues the chosen prefixes of its questions.

Enters: a `Solutions` row with its question and the judge's labels. Leaves: its labels and figures.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from medmm_ray.config import digest, identity
from medmm_ray.data.records import Labels, StepLabel, to_arrow_lists
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Generator, MakeGenerator, policy_prompt, request_seed
from medmm_ray.engines.grader import Grader, MakeGrader
from medmm_ray.engines.images import open_image
from medmm_ray.steps.monte_carlo.config import MonteCarloConfig
from medmm_ray.steps.monte_carlo.search import (
    LabelRule,
    QuestionRollouts,
    SolutionPrefixes,
    completion_answers,
    first_wrong_step,
    limit_steps,
    next_rollouts,
    outcome_of,
    prefix_texts,
    solution_labels,
    uncertain_steps,
)

log = logging.getLogger(__name__)

# What a question adds to the figures of its table; in this order, as they are shown in it.
FIGURES = (
    "rollouts",
    "rollout_tokens",
    "prompt_tokens",
    "cached_tokens",
    "failed_rollouts",
    "prefixes_continued",
    "prefixes_failed",
    "steps_labelled",
    "steps_known_free",
    "answers_asked",
    "answers_unanswered",
)


class RolloutActor:
    """The actor: one engine that continues the chosen prefixes of each question of a batch."""

    def __init__(
        self,
        config: MonteCarloConfig,
        model: str,
        policy: str,
        generator: MakeGenerator = Generator,
        grader: MakeGrader | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.grader = grader() if grader else Grader()
        self.generator = generator(model, config.engine)
        self.annotator = f"{policy}@{digest(policy, identity(config))}"
        # A prefix is continued alike in all modes: the k-th continuation has the same seed.
        self.seed_parts = (
            policy,
            config.seed,
            config.num_documents,
            config.engine.num_images,
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_tokens,
        )
        self.num_questions = 0

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        labels: list[list[Labels]] = []
        figures: list[dict[str, int]] = []
        results = await asyncio.gather(*map(self.label, batch.to_pylist()))
        for row_labels, row_figures in results:
            labels.append(row_labels)
            figures.append(row_figures)
        self.num_questions += len(labels)
        statistics = self.generator.statistics
        log.info(
            "monte_carlo: %d questions, %d tokens, prefix cache hit rate %.3f",
            self.num_questions,
            statistics.output_tokens,
            statistics.hit_rate,
        )
        yield pa.table(
            {
                "question_id": batch["question_id"],
                "labels": to_arrow_lists(Labels, labels),
                "figures": pa.array(figures),
            }
        )

    async def label(self, row: Mapping[str, Any]) -> tuple[list[Labels], dict[str, int]]:
        """The labels of one question's chosen solutions, and what they took."""
        config = self.config
        rule = LabelRule(config.rollouts_per_prefix, config.threshold, config.stop_early)
        # What is reached from a prefix decides its label only where one success does (threshold 0), and spoils a ratio
        # that somebody wants whole.
        share_reached = not config.threshold and (config.stop_early or config.searches)
        rollouts = QuestionRollouts(rule, share_reached)
        solutions = self.chosen_solutions(row) if row["split"] in config.splits else []
        # Solutions of another policy say nothing of what this one reaches.
        if solutions and row["policy"] == self.policy:
            self.use_solutions(row["solutions"], rollouts)
        if config.mode == "uncertain":
            num_steps = sum(len(solution["steps"]) for solution in row["solutions"])
            max_steps = int(config.max_share * num_steps + 1e-9)  # .1 of 30 steps is 3, not 2.999
            solutions = limit_steps(solutions, rollouts, max_steps)
        await self.roll_out(row, solutions, rollouts)
        labels: list[Labels] = []
        step_labels: list[StepLabel] = []
        for solution in solutions:
            label_of_step = solution_labels(solution, rollouts, config.mode)
            if label_of_step:
                record = self.labels_row(row, solution, label_of_step, rollouts)
                labels.append(record)
                step_labels += label_of_step.values()
        return labels, figures_of(rollouts, step_labels)

    def chosen_solutions(self, row: Mapping[str, Any]) -> list[SolutionPrefixes]:
        """The solutions to continue, with what the judge says of them."""
        config = self.config
        judged: dict[str, list[Mapping[str, Any]]] = {}
        for verdict in row["judged"] or []:
            verdicts_of_solution = judged.setdefault(verdict["solution_id"], [])
            verdicts_of_solution.append(verdict)
        # By index: the first solutions are the same however the row lists them.
        by_index = sorted(enumerate(row["solutions"]), key=lambda pair: pair[1]["index"])
        chosen: list[SolutionPrefixes] = []
        for number, solution in by_index[: config.max_solutions]:
            outcome = outcome_of(solution)
            verdicts = judged.get(solution["solution_id"], [])
            if config.wrong_only and outcome is not False:
                continue
            judged_error: int | None = None
            if config.uses_judge and verdicts:
                judged_error = first_wrong_step(verdicts[0]["steps"])
            num_steps = len(solution["steps"])
            steps = tuple(range(num_steps))
            if config.mode == "uncertain":
                steps = uncertain_steps(verdicts)
            if not steps:
                continue
            prefixes = prefix_texts(solution["steps"])
            chosen.append(
                SolutionPrefixes(
                    number,
                    prefixes,
                    outcome,
                    judged_error,
                    steps,
                )
            )
        return chosen

    def use_solutions(self, solutions: Sequence[Mapping[str, Any]], rollouts: QuestionRollouts) -> None:
        """Take what the solutions of this policy show of their own prefixes."""
        outcomes: list[tuple[tuple[str, ...], bool | None]] = []
        for solution in solutions:
            prefixes = prefix_texts(solution["steps"])
            outcomes.append((prefixes, outcome_of(solution)))
        if self.config.counts_solutions:
            rollouts.count_solutions(outcomes)
        for prefixes, outcome in outcomes:
            if outcome:
                rollouts.mark_reached(prefixes[:-1])

    async def roll_out(
        self, row: Mapping[str, Any], solutions: Sequence[SolutionPrefixes], rollouts: QuestionRollouts
    ) -> None:
        """Continue prefixes, round by round, until every label that the mode asks for is decided."""
        shorter_prefixes: dict[str, Sequence[str]] = {}
        for solution in solutions:
            for i, prefix in enumerate(solution.prefixes):
                shorter_prefixes[prefix] = solution.prefixes[: i + 1]
        num_by_prefix = next_rollouts(solutions, rollouts, self.config.mode)
        if not num_by_prefix:
            return
        try:
            prompt = await self.prompt(row)
        except RowError as fault:  # an image that cannot be opened
            rollouts.faults |= dict.fromkeys(num_by_prefix, fault)
            return
        while num_by_prefix:
            # One request a prefix, all of a round side by side on the engine.
            requests = [self.sample(row, prompt, prefix, num, rollouts) for prefix, num in num_by_prefix.items()]
            samples_of_prefixes = await asyncio.gather(*requests)
            for prefix, samples in zip(num_by_prefix, samples_of_prefixes, strict=True):
                if isinstance(samples, RowError):
                    rollouts.faults[prefix] = samples
                    continue
                answers = completion_answers(prefix, samples, row)
                grades = await self.grader.grade(row, answers)
                rollouts.count_samples(prefix, samples, grades)
                # In a search what a longer prefix reaches, each shorter one reaches too.
                if self.config.searches and any(grades.right):
                    rollouts.mark_reached(shorter_prefixes[prefix])
            num_by_prefix = next_rollouts(solutions, rollouts, self.config.mode)

    async def prompt(self, row: Mapping[str, Any]) -> ChatPrompt:
        """What the policy is asked, as in sampling, with the question's images."""
        uris = row["image_uris"] if self.config.engine.num_images else []
        images = await asyncio.gather(*(asyncio.to_thread(open_image, uri) for uri in uris))
        # Room is left for a whole continuation, as in sampling.
        max_prompt_tokens = self.config.engine.max_model_len - self.config.max_tokens
        return policy_prompt(
            self.generator,
            row,
            self.config.num_documents,
            max_prompt_tokens,
            images,
        )

    async def sample(
        self, row: Mapping[str, Any], prompt: ChatPrompt, prefix: str, num: int, rollouts: QuestionRollouts
    ) -> list[Completion] | RowError:
        """`num` further continuations of one prefix, as one request."""
        seed = request_seed("rollout", row["question_id"], self.seed_parts, prefix)
        # Sample k of a prefix has the same seed whatever the rounds were.
        if prefix in rollouts.counts:
            seed += rollouts.counts[prefix].sampled
        prompt = replace(prompt, prefix=prefix)
        try:
            return await self.generator.generate(prompt, num, seed, self.config.sampling)
        except RowError as fault:
            return fault

    def labels_row(
        self,
        row: Mapping[str, Any],
        solution: SolutionPrefixes,
        steps: Mapping[int, StepLabel],
        rollouts: QuestionRollouts,
    ) -> Labels:
        """One solution's row; it has an error only where none of its steps has a label."""
        stored = row["solutions"][solution.number]
        is_labelled = any(step.label is not None for step in steps.values())
        error: str | None = None
        if not is_labelled:
            faults = [rollouts.faults[prefix] for prefix in solution.prefixes if prefix in rollouts.faults]
            error = str(faults[0]) if faults else None
        # A step without a label keeps its place, so that places agree with the solution's steps.
        places = range(len(stored["steps"]))
        return Labels(
            question_id=row["question_id"],
            solution_id=stored["solution_id"],
            source="monte_carlo",
            annotator=self.annotator,
            steps=[steps.get(place, StepLabel()) for place in places],
            cost=0.0,
            error=error,
        )


def figures_of(rollouts: QuestionRollouts, steps: Sequence[StepLabel]) -> dict[str, int]:
    """What a question took, for the manifest: continuations, their tokens, those that do not count, prefixes that could
    not be continued, the labels, and answers that a model was asked to grade and those that it did not."""
    figures = dict.fromkeys(FIGURES, 0)
    figures["rollout_tokens"] = rollouts.num_tokens
    figures["prompt_tokens"] = rollouts.prompt_tokens
    figures["cached_tokens"] = rollouts.cached_tokens
    figures["prefixes_failed"] = len(rollouts.faults)
    for counts in rollouts.counts.values():
        figures["rollouts"] += counts.sampled
        figures["failed_rollouts"] += counts.sampled + counts.from_solutions - counts.answered
        figures["prefixes_continued"] += counts.sampled > 0
    for step in steps:
        if step.label is not None:
            figures["steps_labelled"] += 1
            figures["steps_known_free"] += not step.num_rollouts
    for grades in rollouts.grades:
        figures["answers_asked"] += grades.asked
        figures["answers_unanswered"] += grades.unanswered
    return figures
