"""Which prefixes of a question's solutions to continue, when to stop, and what the labels say; pure.

A *prefix* is a solution up to one of its steps; equal prefixes of several solutions are one. What is known is free:

- the final step, where the solution was ended by the model and states an answer: the outcome is its value;
- a right answer *reached* from a prefix by a solution of the question shows that it can be reached: with a threshold of
  0 the label is 1 without a continuation. In a search a continuation of a longer prefix shows it too. In the other
  modes it does not count: it is true, but where a wrong prefix recovers now and then, each further step that is
  continued is a further chance to call those before it right (on 40 phantoms: 6 points of first-error accuracy lost);
- the question's own solutions through a prefix are continuations of it. They are counted as such only where the prefix
  was chosen without a look at what they came to: of a solution that is continued *because* its answer is wrong (or
  because a judge who has read it to the end doubts a step), its own end would bias the ratio. What stays is the quality
  filter: solutions were kept for a number of steps that no continuation is asked for.

A label of 1 found in such a way, or by stopping at the first success, is right but its ratio is not: `stopped_early`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medmm_ray.config import digest
from medmm_ray.data.records import StepLabel
from medmm_ray.data.tables import RowError
from medmm_ray.engines.generator import Completion
from medmm_ray.engines.grader import Grades
from medmm_ray.text import extract_answer, solution_prefix

FIRST_ROUND = 2  # continuations at first; each further round has as many as all before: 2, 2, 4, 8


@dataclass
class RolloutCounts:
    """Continuations of one prefix so far: `known` are the question's own solutions, `drawn` those asked for.

    `counted` of both ended with an answer, `correct` with the right one; `cut_off` were longer than allowed.
    """

    known: int = 0
    drawn: int = 0
    counted: int = 0
    correct: int = 0
    cut_off: int = 0

    def add(self, outcomes: Iterable[bool | None]) -> None:
        """Count answers that are right (True), wrong (False) or not there (None)."""
        for right in outcomes:
            self.counted += right is not None
            self.correct += right is True


@dataclass(frozen=True)
class LabelRule:
    """A prefix is right where more than `threshold` of its counted continuations are, of `num_rollouts` in all."""

    num_rollouts: int
    threshold: float
    stop_early: bool

    def left(self, tally: RolloutCounts) -> int:
        """How many continuations are still to be drawn."""
        return max(0, self.num_rollouts - tally.known - tally.drawn)

    def label(self, tally: RolloutCounts) -> bool | None:
        """The label, once nothing is left or, with `stop_early`, nothing that is left could change it; else None.

        The same with `stop_early` as without, whether or not some of what is left would fail.
        """
        left = self.left(tally) if self.stop_early else 0
        if (self.left(tally) and not self.stop_early) or not tally.counted + left:
            return None
        if tally.correct / (tally.counted + left) > self.threshold:
            return True
        return False if (tally.correct + left) / (tally.counted + left) <= self.threshold else None

    def due(self, tally: RolloutCounts) -> int:
        """How many continuations to draw next."""
        left = self.left(tally)
        if self.label(tally) is not None:
            return 0
        return min(left, max(FIRST_ROUND, tally.drawn)) if self.stop_early else left


@dataclass(frozen=True)
class SolutionPrefixes:
    """One chosen solution.

    `prefixes` has the text up to each step; `outcome` says whether its answer is right, None where it has none; `guess`
    is the place of the judge's first wrong step (behind the last one for none), None where no judge was asked; `steps`
    are the places whose labels are wanted, where these are not searched.
    """

    number: int
    prefixes: tuple[str, ...]
    outcome: bool | None
    guess: int | None = None
    steps: tuple[int, ...] = ()


@dataclass
class QuestionRollouts:
    """What is known of one question's prefixes. `reached`: the right answer has been reached from there."""

    rule: LabelRule
    share_reached: bool
    tallies: dict[str, RolloutCounts] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    faults: dict[str, RowError] = field(default_factory=dict)
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    grades: list[Grades] = field(default_factory=list)

    def count_solutions(self, solutions: Iterable[tuple[Sequence[str], bool | None]]) -> None:
        """Take the question's solutions (prefixes, outcome) as continuations of each of their prefixes but the last."""
        for prefixes, outcome in solutions:
            if outcome is not None:
                for prefix in prefixes[:-1]:
                    tally = self.tallies.setdefault(prefix, RolloutCounts())
                    tally.known += 1
                    tally.add([outcome])

    def reach(self, prefixes: Iterable[str]) -> None:
        if self.share_reached:
            self.reached |= set(prefixes)

    def label(self, prefix: str) -> bool | None:
        if prefix in self.reached:
            return True
        return self.rule.label(self.tallies[prefix]) if prefix in self.tallies else None

    def due(self, prefix: str) -> int:
        """How many continuations of a prefix to draw next; 0 where its label is known or cannot be had."""
        if prefix in self.reached or prefix in self.faults:
            return 0
        return self.rule.due(self.tallies.get(prefix, RolloutCounts()))

    def labels(self, chain: SolutionPrefixes) -> list[bool | None]:
        """What is known of each step of a solution, the final one by its outcome."""
        found = [self.label(prefix) for prefix in chain.prefixes]
        return found if chain.outcome is None else [*found[:-1], chain.outcome]

    def step_label(self, chain: SolutionPrefixes, index: int) -> StepLabel:
        """The record of one step that was continued or is known."""
        if index == len(chain.prefixes) - 1 and chain.outcome is not None:
            return known_label(chain.outcome, self.rule.threshold)
        prefix = chain.prefixes[index]
        label, tally = self.label(prefix), self.tallies.get(prefix, RolloutCounts())
        if label is None:
            return StepLabel(num_correct=tally.correct, num_rollouts=tally.counted, reason=self.fault(prefix, tally))
        by_others = label != self.rule.label(tally)
        return StepLabel(
            label=int(label),
            value=tally.correct / tally.counted if tally.counted else None,
            num_correct=tally.correct,
            num_rollouts=tally.counted,
            stopped_early=by_others or self.rule.left(tally) > 0,
            reason="the right answer was reached from here by another way" if by_others else None,
        )

    def fault(self, prefix: str, tally: RolloutCounts) -> str:
        """Why a prefix that was continued has no label."""
        if prefix in self.faults:
            return str(self.faults[prefix])
        unanswered = tally.drawn - tally.cut_off
        return f"{tally.drawn} continuations: {tally.cut_off} cut off, {unanswered} without an answer"


def next_step(labels: Sequence[bool | None], guess: int | None, search: bool) -> int | None:
    """The step whose prefix to continue next in search of the first wrong one; None where it is found or given up.

    It lies between the last step known to be right and the first known to be wrong. The step before the `guess` comes
    first, then the guess itself; with `search`, what is between is halved, which takes ceil(log2 T) steps of T.
    """
    wrong = next((i for i, label in enumerate(labels) if label is False), len(labels))
    right = max((i for i, label in enumerate(labels[:wrong]) if label), default=-1)
    if wrong - right <= 1:
        return None
    if guess is not None:
        for step in (guess - 1, guess):
            if right < step < wrong:
                return step
    return (right + wrong) // 2 if search else None


def wanted(chains: Sequence[SolutionPrefixes], findings: QuestionRollouts, mode: str) -> dict[str, int]:
    """The prefixes to continue next, each with how many times; empty when all is done.

    All solutions of a question move on together, round by round, so nothing depends on their order.
    """
    due: dict[str, int] = {}
    for chain in chains:
        labels = findings.labels(chain)
        if mode in ("first_error", "verify"):
            before = labels[:-1] if chain.outcome else labels  # a right end says nothing of another policy's chances
            step = next_step(before, chain.guess, search=mode == "first_error")
            steps: Sequence[int] = [] if step is None else [step]
        else:
            steps = [i for i in chain.steps if labels[i] is None]
        for i in steps:
            if num := findings.due(chain.prefixes[i]):
                due[chain.prefixes[i]] = num
    return due


def labelled(chain: SolutionPrefixes, findings: QuestionRollouts, mode: str) -> dict[int, StepLabel]:
    """The labels of a solution: of the steps that were wanted, or what a search for the first wrong step gives.

    A search labels 1 all steps from which the right answer was reached, 0 the first one known to be wrong, and nothing
    behind it; a step whose prefix failed has a reason instead of a label, and those between it and the rest nothing.
    """
    labels = findings.labels(chain)
    if mode in ("first_error", "verify"):
        first = next((i for i, label in enumerate(labels) if label is False), len(labels) - 1)
        steps = [i for i in range(first + 1) if labels[i] is not None or _tried(chain.prefixes[i], findings)]
    else:
        steps = [i for i in chain.steps if labels[i] is not None or _tried(chain.prefixes[i], findings)]
    return {i: findings.step_label(chain, i) for i in steps}


def _tried(prefix: str, findings: QuestionRollouts) -> bool:
    """Whether a prefix without a label was continued as often as it may be."""
    return prefix in findings.faults or (prefix in findings.tallies and not findings.due(prefix))


def within_share(chains: Sequence[SolutionPrefixes], findings: QuestionRollouts, room: int) -> list[SolutionPrefixes]:
    """The solutions with at most `room` wanted steps that need continuations, chosen by their texts alone."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, chain in enumerate(chains):
        labels = findings.labels(chain)
        for i in chain.steps:
            if labels[i] is None:
                groups.setdefault(chain.prefixes[i], []).append((number, i))
    dropped: set[tuple[int, int]] = set()
    for prefix in sorted(groups, key=digest):
        if len(groups[prefix]) <= room:
            room -= len(groups[prefix])
        else:
            dropped |= set(groups[prefix])
    kept = [tuple(i for i in chain.steps if (number, i) not in dropped) for number, chain in enumerate(chains)]
    return [
        SolutionPrefixes(chain.number, chain.prefixes, chain.outcome, chain.guess, steps)
        for chain, steps in zip(chains, kept, strict=True)
        if steps
    ]


def uncertain_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The steps of one solution in which a judge's confidence is low, or two judges differ."""
    judged = list(zip(*(row["steps"] for row in rows), strict=True))
    return tuple(
        i
        for i, votes in enumerate(judged)
        if any(vote["confidence"] == "low" for vote in votes) or {0, 1} <= {vote["label"] for vote in votes}
    )


def first_wrong(steps: Sequence[Mapping[str, Any]]) -> int:
    """The place of a judge's first wrong step; behind the last one where there is none."""
    return next((i for i, step in enumerate(steps) if step["label"] == 0), len(steps))


def prefix_text(steps: Sequence[str], index: int) -> str:
    """The solution up to step `index` (from 0), with the next step's mark, so that another step must follow."""
    return solution_prefix(steps[: index + 1])


def prefix_texts(steps: Sequence[str]) -> tuple[str, ...]:
    return tuple(prefix_text(steps, index) for index in range(len(steps)))


def outcome_of(solution: Mapping[str, Any]) -> bool | None:
    """Whether a solution's answer is right; None where it has none or was cut off."""
    correct: bool | None = solution["correct"]
    return correct if solution["finish_reason"] == "stop" else None


def answers(prefix: str, samples: Sequence[Completion], question: Mapping[str, Any]) -> list[str | None]:
    """The answer of each continuation; None for one that was cut off or states none."""
    return [
        extract_answer(prefix + sample.text, question["options"], question["answer_type"])
        if sample.finish_reason == "stop"
        else None
        for sample in samples
    ]


def known_label(correct: bool, threshold: float) -> StepLabel:
    """The label of a final step: nothing is left to roll out."""
    value = float(correct)
    return StepLabel(label=int(value > threshold), value=value, num_correct=0, num_rollouts=0, stopped_early=False)
