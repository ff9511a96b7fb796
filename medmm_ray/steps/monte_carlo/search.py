"""Which prefixes of a question's solutions to continue, when to stop, and what the labels say; pure.

A *prefix* is a solution up to one of its steps; equal prefixes of several solutions are one. Some labels need no
continuation:

- the final step, where the solution was ended by the model and states an answer: the outcome is its value;
- a right answer *reached* from a prefix by a solution of the question shows that it can be reached: with a threshold of
  0 the label is 1 without a continuation. In a search a continuation of a longer prefix shows it too. In the other
  modes it does not count: it is true, but where a wrong prefix recovers now and then, each further step that is
  continued is a further chance to call those before it right (on 40 phantoms: 6 points of first-error accuracy lost);
- the question's own solutions through a prefix are continuations of it. They are counted as such only where the prefix
  was chosen without a look at what they came to: of a solution that is continued *because* its answer is wrong (or
  because a judge who has read it to the end doubts a step), its own end would bias the ratio. What stays is the quality
  filter: solutions were kept for a number of steps that no continuation is asked for.

A label of 1 that came about in such a way, or by stopping at the first success, is right but its ratio is not:
`stopped_early`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medmm_ray.config import digest
from medmm_ray.data.records import StepLabel
from medmm_ray.data.tables import RowError
from medmm_ray.engines.generator import Completion
from medmm_ray.engines.grader import Grades
from medmm_ray.text import extract_answer, solution_prefix

FIRST_ROUND = 2  # continuations at first; each further round has as many as all before: 2, 2, 4, 8
ANOTHER_WAY = "the right answer was reached from here by another way"  # reason of a label that was not counted out
SEARCHES = ("first_error", "verify")  # modes that look for the first wrong step


@dataclass
class RolloutCounts:
    """Continuations of one prefix so far: those sampled for it, and the question's own solutions through it.

    `answered` of both ended with an answer, `correct` with the right one; `cut_off` were longer than allowed.
    """

    from_solutions: int = 0
    sampled: int = 0
    answered: int = 0
    correct: int = 0
    cut_off: int = 0

    def add(self, outcomes: Iterable[bool | None]) -> None:
        """Count answers that are right (True), wrong (False) or not there (None)."""
        for is_right in outcomes:
            self.answered += is_right is not None
            self.correct += is_right is True


@dataclass(frozen=True)
class LabelRule:
    """A prefix is right where more than `threshold` of its answered continuations are, of `num_rollouts` in all."""

    num_rollouts: int
    threshold: float
    stop_early: bool

    def num_remaining(self, counts: RolloutCounts) -> int:
        """How many continuations may still be sampled."""
        return max(0, self.num_rollouts - counts.from_solutions - counts.sampled)

    def label(self, counts: RolloutCounts) -> bool | None:
        """The label, once nothing remains or, with `stop_early`, nothing that remains could change it; else None.

        The same with `stop_early` as without, whether or not some of what remains would fail.
        """
        remaining = self.num_remaining(counts)
        # Whole ratios: all continuations are sampled before anything is said.
        if remaining and not self.stop_early:
            return None
        most_answered = counts.answered + remaining
        if not most_answered:
            return None
        # Right even if all that remain are wrong; wrong even if all that remain are right.
        least_correct = counts.correct
        most_correct = counts.correct + remaining
        if least_correct / most_answered > self.threshold:
            return True
        if most_correct / most_answered <= self.threshold:
            return False
        return None

    def num_next(self, counts: RolloutCounts) -> int:
        """How many continuations to sample in the next round; 0 where the label is decided."""
        if self.label(counts) is not None:
            return 0
        remaining = self.num_remaining(counts)
        if not self.stop_early:
            return remaining
        doubled = max(FIRST_ROUND, counts.sampled)
        return min(remaining, doubled)


@dataclass(frozen=True)
class SolutionPrefixes:
    """One chosen solution.

    `prefixes` has the text up to each step; `outcome` says whether its answer is right, None where it has none;
    `judged_error` is the place of the judge's first wrong step (behind the last one for none), None where no judge was
    asked; `steps` are the places to label, where these are not searched.
    """

    number: int
    prefixes: tuple[str, ...]
    outcome: bool | None
    judged_error: int | None = None
    steps: tuple[int, ...] = ()


@dataclass
class QuestionRollouts:
    """The continuations of one question's prefixes so far. `reached`: the right answer has been reached from there."""

    rule: LabelRule
    share_reached: bool
    counts: dict[str, RolloutCounts] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    faults: dict[str, RowError] = field(default_factory=dict)
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    grades: list[Grades] = field(default_factory=list)

    def count_solutions(self, solutions: Iterable[tuple[Sequence[str], bool | None]]) -> None:
        """Take the question's solutions (prefixes, outcome) as continuations of each of their prefixes but the last."""
        for prefixes, outcome in solutions:
            if outcome is None:
                continue
            for prefix in prefixes[:-1]:
                counts = self.counts.setdefault(prefix, RolloutCounts())
                counts.from_solutions += 1
                counts.add([outcome])

    def count_samples(self, prefix: str, samples: Sequence[Completion], grades: Grades) -> None:
        """Take the continuations that were sampled of a prefix, and what their answers are worth."""
        counts = self.counts.setdefault(prefix, RolloutCounts())
        counts.sampled += len(samples)
        counts.add(grades.right)
        self.grades.append(grades)
        for sample in samples:
            counts.cut_off += sample.finish_reason != "stop"
            self.num_tokens += sample.num_tokens
            self.prompt_tokens += sample.prompt_tokens
            self.cached_tokens += sample.cached_tokens

    def mark_reached(self, prefixes: Iterable[str]) -> None:
        """Note that the right answer was reached from these prefixes, where that decides labels."""
        if self.share_reached:
            self.reached |= set(prefixes)

    def label(self, prefix: str) -> bool | None:
        """Whether a prefix is right; None while that is open."""
        if prefix in self.reached:
            return True
        return self.rule.label(self.counts[prefix]) if prefix in self.counts else None

    def num_next(self, prefix: str) -> int:
        """How many continuations of a prefix to sample next; 0 where its label is decided or cannot be had."""
        if prefix in self.reached or prefix in self.faults:
            return 0
        counts = self.counts.get(prefix, RolloutCounts())
        return self.rule.num_next(counts)

    def labels(self, solution: SolutionPrefixes) -> list[bool | None]:
        """The label of each step of a solution as far as it is decided, the final one by the outcome."""
        labels = list(map(self.label, solution.prefixes))
        if solution.outcome is None:
            return labels
        return [*labels[:-1], solution.outcome]

    def step_label(self, solution: SolutionPrefixes, index: int) -> StepLabel:
        """The record of one step that was continued or is decided."""
        if index == len(solution.prefixes) - 1 and solution.outcome is not None:
            return final_step_label(solution.outcome, self.rule.threshold)
        prefix = solution.prefixes[index]
        label = self.label(prefix)
        counts = self.counts.get(prefix, RolloutCounts())
        if label is None:
            return StepLabel(
                num_correct=counts.correct,
                num_rollouts=counts.answered,
                reason=self.fault(prefix, counts),
            )
        # The label of its own continuations may still be open, or differ.
        by_another_way = label != self.rule.label(counts)
        return StepLabel(
            label=int(label),
            value=counts.correct / counts.answered if counts.answered else None,
            num_correct=counts.correct,
            num_rollouts=counts.answered,
            stopped_early=by_another_way or self.rule.num_remaining(counts) > 0,
            reason=ANOTHER_WAY if by_another_way else None,
        )

    def fault(self, prefix: str, counts: RolloutCounts) -> str:
        """Why a prefix that was continued has no label."""
        if prefix in self.faults:
            return str(self.faults[prefix])
        unanswered = counts.sampled - counts.cut_off
        return f"{counts.sampled} continuations: {counts.cut_off} cut off, {unanswered} without an answer"


def next_step(labels: Sequence[bool | None], judged_error: int | None, search: bool) -> int | None:
    """The step whose prefix to continue next in search of the first wrong one; None where that is decided or given up.

    It lies between the last step that is right and the first that is wrong. The step before the judge's first wrong one
    comes first, then that one; with `search`, what is between is halved, which takes ceil(log2 T) steps of T.
    """
    # The first wrong step lies in (right, wrong].
    wrong = _first_false(labels, len(labels))
    right = -1
    for i, label in enumerate(labels[:wrong]):
        if label:
            right = i
    if wrong - right <= 1:
        return None
    if judged_error is not None:
        for step in (judged_error - 1, judged_error):
            if right < step < wrong:
                return step
    return (right + wrong) // 2 if search else None


def next_rollouts(solutions: Sequence[SolutionPrefixes], rollouts: QuestionRollouts, mode: str) -> dict[str, int]:
    """The prefixes to continue next, each with how many times; empty when all is done.

    All solutions of a question move on together, round by round, so nothing depends on their order.
    """
    num_by_prefix: dict[str, int] = {}
    for solution in solutions:
        for step in _open_steps(solution, rollouts, mode):
            prefix = solution.prefixes[step]
            # Solutions that share the prefix ask for the same continuations.
            if num := rollouts.num_next(prefix):
                num_by_prefix[prefix] = num
    return num_by_prefix


def _open_steps(solution: SolutionPrefixes, rollouts: QuestionRollouts, mode: str) -> list[int]:
    """The steps of a solution that need a label next."""
    labels = rollouts.labels(solution)
    if mode not in SEARCHES:
        return [i for i in solution.steps if labels[i] is None]
    # A right end is left out: it says nothing of another policy's chances.
    searched = labels[:-1] if solution.outcome else labels
    step = next_step(searched, solution.judged_error, search=mode == "first_error")
    return [] if step is None else [step]


def solution_labels(solution: SolutionPrefixes, rollouts: QuestionRollouts, mode: str) -> dict[int, StepLabel]:
    """The labels of a solution: of its chosen steps, or what a search for the first wrong step gives.

    A search labels 1 all steps from which the right answer was reached, 0 the first wrong one, and nothing behind it; a
    step whose prefix failed has a reason instead of a label, and those between it and the rest nothing.
    """
    labels = rollouts.labels(solution)
    steps: Iterable[int] = solution.steps
    if mode in SEARCHES:
        steps = range(_first_false(labels, len(labels) - 1) + 1)
    records: dict[int, StepLabel] = {}
    for i in steps:
        if labels[i] is not None or _is_exhausted(solution.prefixes[i], rollouts):
            records[i] = rollouts.step_label(solution, i)
    return records


def _first_false(labels: Sequence[bool | None], default: int) -> int:
    """The place of the first label that is wrong; `default` where none is."""
    for i, label in enumerate(labels):
        if label is False:
            return i
    return default


def _is_exhausted(prefix: str, rollouts: QuestionRollouts) -> bool:
    """Whether a prefix without a label was continued as often as it may be."""
    if prefix in rollouts.faults:
        return True
    return prefix in rollouts.counts and not rollouts.num_next(prefix)


def limit_steps(
    solutions: Sequence[SolutionPrefixes], rollouts: QuestionRollouts, max_steps: int
) -> list[SolutionPrefixes]:
    """The solutions with at most `max_steps` chosen steps that need continuations, chosen by their texts alone."""
    undecided: dict[str, list[tuple[int, int]]] = {}  # prefix -> (solution, step)
    for number, solution in enumerate(solutions):
        labels = rollouts.labels(solution)
        for i in solution.steps:
            if labels[i] is None:
                places = undecided.setdefault(solution.prefixes[i], [])
                places.append((number, i))
    dropped: set[tuple[int, int]] = set()
    # A hash's order is as good as a random one, and the same however the solutions are ordered.
    for prefix in sorted(undecided, key=digest):
        places = undecided[prefix]
        if len(places) <= max_steps:
            max_steps -= len(places)
        else:
            dropped.update(places)
    limited: list[SolutionPrefixes] = []
    for number, solution in enumerate(solutions):
        steps = tuple(i for i in solution.steps if (number, i) not in dropped)
        if steps:
            limited.append(replace(solution, steps=steps))
    return limited


def uncertain_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The steps of one solution in which a judge's confidence is low, or two judges differ."""
    steps_of_judges = [row["steps"] for row in rows]
    steps: list[int] = []
    for i, votes in enumerate(zip(*steps_of_judges, strict=True)):
        labels = {vote["label"] for vote in votes}
        confidences = {vote["confidence"] for vote in votes}
        # A neutral step (None) is no disagreement.
        if {0, 1} <= labels or "low" in confidences:
            steps.append(i)
    return tuple(steps)


def first_wrong_step(steps: Sequence[Mapping[str, Any]]) -> int:
    """The place of a judge's first wrong step; behind the last one where there is none."""
    for i, step in enumerate(steps):
        if step["label"] == 0:
            return i
    return len(steps)


def prefix_text(steps: Sequence[str], index: int) -> str:
    """The solution up to step `index` (from 0), with the next step's mark, so that another step must follow."""
    return solution_prefix(steps[: index + 1])


def prefix_texts(steps: Sequence[str]) -> tuple[str, ...]:
    """The prefix that ends with each of the steps."""
    prefixes: list[str] = []
    for index in range(len(steps)):
        prefixes.append(prefix_text(steps, index))
    return tuple(prefixes)


def outcome_of(solution: Mapping[str, Any]) -> bool | None:
    """Whether a solution's answer is right; None where it has none or was cut off."""
    if solution["finish_reason"] != "stop":
        return None
    correct: bool | None = solution["correct"]
    return correct


def completion_answers(prefix: str, samples: Sequence[Completion], question: Mapping[str, Any]) -> list[str | None]:
    """The answer of each continuation; None for one that was cut off or states none."""
    answers: list[str | None] = []
    for sample in samples:
        answer = None
        if sample.finish_reason == "stop":
            # With the prefix: an answer may be stated across the cut.
            answer = extract_answer(prefix + sample.text, question["options"], question["answer_type"])
        answers.append(answer)
    return answers


def final_step_label(correct: bool, threshold: float) -> StepLabel:
    """The label of a final step: nothing remains to roll out."""
    value = float(correct)
    return StepLabel(
        label=int(value > threshold),
        value=value,
        num_correct=0,
        num_rollouts=0,
        stopped_early=False,
    )
