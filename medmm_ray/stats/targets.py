"""From label rows to training targets: the label policies, by name, as pure functions.

Enters: one solution's label rows, of any sources, side by side. Leaves: one target a step, the probability that the
step is right, or None where it is not trained on. A judge's and an expert's label is about the step itself; Monte
Carlo's value is about the prefix that ends there.

A step that nobody looked at is an empty `StepLabel` and is no target; a *neutral* step (looked at, nothing checkable in
it: a confidence or a reason, but no label and no value) trains as right, unless it follows the first error.

| policy | a step's target | `after_first_error` |
|---|---|---|
| judge | the judge's verdict | collapse (Med-PRM), keep or drop (Qwen) |
| monte_carlo | VisualPRM's: does the success rate from here exceed the threshold? | keep (VisualPRM), or any |
| hybrid | an expert's word, else monte_carlo where it ran, else the judge's | any |
| consensus | the judge's, of solutions in which Monte Carlo sees the same first error (a right answer: none) | any |
| soft | as hybrid, with Monte Carlo's success rate itself | any |
| advantage | VisualPRM's: did it raise (1) or lower (0) the success rate? unchanged: not trained on | keep alone |
| outcome | the last step alone, by the answer | means nothing |
| tree_search | MedS3's label of a step in the question's search tree | any |
| tree_search_soft | the step's value in that tree | any |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from medmm_ray.data.records import Labels, StepLabel

LabelPolicy = Literal[
    "judge", "monte_carlo", "hybrid", "consensus", "soft", "advantage", "outcome", "tree_search", "tree_search_soft"
]
AfterFirstError = Literal["collapse", "keep", "drop"]
Target = float | None
ConsensusStatus = Literal["agreed", "differed", "not_judged", "not_continued", "failed"]

ADJUDICATOR = "adjudicator"


@dataclass(frozen=True)
class AnswerOutcome:
    """Whether a solution's answer is right, and what share of its question's answers is."""

    correct: bool | None
    accuracy: float | None


def targets(
    policy: str,
    labels: Sequence[Labels],
    num_steps: int,
    after_first_error: str = "collapse",
    correct: bool | None = None,
    accuracy: float | None = None,
) -> list[Target]:
    """The training targets of one solution of `num_steps` steps, each in [0, 1] or None (not trained on).

    `policy` is one of `POLICIES`; `after_first_error` sets the steps behind the first target of 0: ``collapse`` to 0
    (Med-PRM), ``keep`` as labelled (VisualPRM) or ``drop`` (Qwen). `correct` says whether the final answer is right,
    for ``outcome``; `accuracy`, for ``advantage``, what share of the question's solutions is, of those that answer:
    they are continuations of the empty prefix, from which the first step sets out. Rows with an error are not labels.

    Raises ValueError for labels that do not match the steps in number or whose value is no number from 0 to 1 (NaN),
    with the ids, and for labels or an `after_first_error` that the policy cannot use.
    """
    if policy not in POLICIES:
        raise ValueError(f"label policy {policy!r} is unknown; there are {', '.join(sorted(POLICIES))}")
    usable = _without_error(labels)
    for row in usable:
        # A label of another text would train the wrong step: refused, never shortened to fit.
        _check(row, num_steps)
    if policy == "advantage" and after_first_error != "keep":
        raise ValueError(
            f"label policy 'advantage' needs after_first_error='keep', not {after_first_error!r}: a step that lowers "
            "the chances says nothing of the steps behind it"
        )
    as_labelled = POLICIES[policy](
        usable,
        num_steps,
        AnswerOutcome(correct, accuracy),
    )
    return _after_first_error(as_labelled, after_first_error)


def _without_error(labels: Sequence[Labels]) -> list[Labels]:
    return [row for row in labels if row.error is None]


def _rows_of(labels: Sequence[Labels], source: str) -> list[Labels]:
    """The rows of one source, of all its annotators."""
    return [row for row in labels if row.source == source]


def _check(row: Labels, num_steps: int) -> None:
    """Raise ValueError where a row's labels cannot be those of a solution of `num_steps` steps."""
    name = f"{row.source} labels of solution {row.solution_id} (question {row.question_id}, annotator {row.annotator})"
    if len(row.steps) != num_steps:
        raise ValueError(f"{name} are {len(row.steps)} for {num_steps} steps; they belong to another text")
    for step in row.steps:
        if step.value is not None and not 0 <= step.value <= 1:  # so that NaN is refused too
            raise ValueError(
                f"{name} have the value {step.value}; expected numbers from 0 to 1: label the solution again"
            )


def labels_by_solution(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Labels]]:
    """Plain rows of one or several labels tables as records, grouped by solution."""
    grouped: dict[str, list[Labels]] = {}
    for row in rows:
        steps = [StepLabel(**step) for step in row["steps"]]
        record = Labels(**{**row, "steps": steps})
        grouped.setdefault(record.solution_id, []).append(record)
    return grouped


def accuracy_of(solutions: Iterable[Mapping[str, Any]]) -> float | None:
    """What share of a question's answers is right; None where there is no answer."""
    graded = [solution["correct"] for solution in solutions if solution["correct"] is not None]
    return sum(graded) / len(graded) if graded else None


def _after_first_error(values: list[Target], rule: str) -> list[Target]:
    first = _first_wrong(values)
    if first == len(values) or rule == "keep":
        return values
    if rule not in ("collapse", "drop"):
        raise ValueError(f"after_first_error is {rule!r}; it must be collapse, keep or drop")
    after: Target = 0.0 if rule == "collapse" else None
    num_after = len(values) - first - 1
    return values[: first + 1] + [after] * num_after


def _first_wrong(values: Sequence[Target]) -> int:
    """The index of the first target of 0, the number of targets where there is none."""
    # A soft target, however small, is no verdict: only 0 is an error.
    for index, value in enumerate(values):
        if value == 0.0:
            return index
    return len(values)


def _is_neutral(step: StepLabel) -> bool:
    return step.label is None and step.value is None and (step.confidence is not None or step.reason is not None)


def _verdict(step: StepLabel) -> Target:
    """A verdict about the step itself: its label; 1 where it is neutral; None where nobody looked."""
    if step.label is not None:
        return float(step.label)
    return 1.0 if _is_neutral(step) else None


def _hard(step: StepLabel) -> Target:
    """Monte Carlo's label; without one, right while any continuation reaches the answer (0 is the best threshold)."""
    if step.label is not None:
        return float(step.label)
    return None if step.value is None else float(step.value > 0)


def merge_annotators(rows: Sequence[Labels], num_steps: int) -> list[StepLabel]:
    """What the annotators of one source say of each step together, one entry a step.

    The adjudicator's word where he looked; else the majority of those who call the step right or wrong, of which the
    first by name gives the entry; a tie is no label. Where nobody calls it either, it is neutral if somebody found it
    so. `label_arrays.source_labels` is the same rule on whole tables.
    """
    ordered = sorted(rows, key=lambda row: row.annotator)  # so that the order of rows in a table changes nothing
    adjudicated = [row for row in ordered if row.annotator == ADJUDICATOR]
    steps = []
    for index in range(num_steps):
        last_word = [row.steps[index] for row in adjudicated]
        everyone = [row.steps[index] for row in ordered]
        steps.append(_merge_step(last_word, everyone))
    return steps


def _merge_step(last_word: Sequence[StepLabel], everyone: Sequence[StepLabel]) -> StepLabel:
    adjudicated = [step for step in last_word if _hard(step) is not None or _is_neutral(step)]
    entries = adjudicated or everyone
    right: list[StepLabel] = []
    wrong: list[StepLabel] = []
    for step in entries:
        label = _hard(step)
        if label == 1.0:
            right.append(step)
        elif label == 0.0:
            wrong.append(step)
    if len(right) != len(wrong):
        return max(right, wrong, key=len)[0]
    if right:  # a tie
        return StepLabel()
    for step in entries:
        if _is_neutral(step):
            return step
    return StepLabel()


def _of_source(
    labels: Sequence[Labels],
    source: str,
    num_steps: int,
    target: Callable[[StepLabel], Target] = _verdict,
) -> list[Target]:
    """The targets of one source, its annotators merged (`merge_annotators`)."""
    merged = merge_annotators(_rows_of(labels, source), num_steps)
    return list(map(target, merged))


def _first_of(*by_source: list[Target]) -> list[Target]:
    """For each step the target of the first source that has one."""
    first: list[Target] = []
    for of_step in zip(*by_source, strict=True):
        first.append(next((value for value in of_step if value is not None), None))
    return first


def judge(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """The judge's verdicts."""
    return _of_source(labels, "judge", num_steps)


def monte_carlo(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """1 where any continuation of the step was right; None where Monte Carlo did not run."""
    return _of_source(labels, "monte_carlo", num_steps, _hard)


def hybrid(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:
    """An expert's word, else Monte Carlo where it ran, else the judge's."""
    return _first_of(
        _of_source(labels, "expert", num_steps),
        monte_carlo(labels, num_steps, answer),
        _of_source(labels, "judge", num_steps),
    )


def soft(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """As `hybrid`, with Monte Carlo's fraction itself as the target.

    Raises ValueError where Monte Carlo stopped early: the fraction is then too high.
    """
    return _first_of(
        _of_source(labels, "expert", num_steps),
        _ratios("soft", labels, num_steps),
        _of_source(labels, "judge", num_steps),
    )


def advantage(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:
    """1 where a step raised Monte Carlo's fraction over the step before, 0 where it lowered it, else None.

    The first step is compared with the accuracy of the question's solutions. A step that left the fraction as it was is
    not trained on (one that stays at 1.0 is not bad), nor is one that has no fraction, or whose predecessor has none.

    Raises ValueError where Monte Carlo stopped early: the fraction is then too high.
    """
    values = _ratios("advantage", labels, num_steps)
    advantages: list[Target] = []
    before = answer.accuracy
    for value in values:
        raised = None
        if value is not None and before is not None and value != before:
            raised = float(value > before)
        advantages.append(raised)
        before = value  # None too: what follows a gap cannot be compared
    return advantages


def _ratios(policy: str, labels: Sequence[Labels], num_steps: int) -> list[Target]:
    """Monte Carlo's success rate at each step; refused where rollouts stopped early, which biases it."""
    for row in labels:
        if row.source == "monte_carlo" and any(step.stopped_early for step in row.steps):
            raise ValueError(
                f"label policy {policy!r} needs whole ratios, and the monte_carlo labels of solution {row.solution_id} "
                "stopped early: a ratio that ends with its first success is too high (one by one a true .25 reads "
                ".46). Run monte_carlo with stop_early=false, or take 'hybrid'"
            )
    return _values(labels, "monte_carlo", num_steps)


def _values(labels: Sequence[Labels], source: str, num_steps: int) -> list[Target]:
    """The mean of one source's values at each step."""
    rows = _rows_of(labels, source)
    means: list[Target] = []
    for index in range(num_steps):
        values: list[float] = []
        for row in rows:
            value = row.steps[index].value
            if value is not None:
                values.append(value)
        means.append(sum(values) / len(values) if values else None)
    return means


def consensus(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:
    """The judge's verdicts of a solution where judge and Monte Carlo agree on the first wrong step, else nothing."""
    agreed = consensus_status(labels, num_steps, answer.correct) == "agreed"
    return judge(labels, num_steps, answer) if agreed else [None] * num_steps


def consensus_status(labels: Sequence[Labels], num_steps: int, correct: bool | None) -> ConsensusStatus:
    """Whether judge and Monte Carlo agree on a solution's first wrong step, or that there is none; else why not.

    They agree where Monte Carlo finds every step before the judge's first wrong one right, and that one wrong; what
    comes behind it does not matter. A right answer is itself a continuation of each of its prefixes that came out
    right: where Monte Carlo says nothing of a step, it says that no step is wrong yet. Without a right answer nobody
    knows where Monte Carlo did not run on one of these steps (`not_continued`), or where its row or its continuations
    failed there (`failed`); and nowhere without the judge's verdict on each step (`not_judged`).
    """
    usable = _without_error(labels)
    judged = _of_source(usable, "judge", num_steps)
    if None in judged:
        return "not_judged"
    continued = _of_source(usable, "monte_carlo", num_steps, _hard)
    first_wrong = _first_wrong(judged)
    expected = [1.0] * first_wrong + [0.0] * (first_wrong < num_steps)
    values = continued[: len(expected)]  # what comes behind the first error does not matter
    if correct:
        # The solution itself is a continuation that came out right.
        values = [1.0 if value is None else value for value in values]
    for value, expected_value in zip(values, expected, strict=True):
        if value is not None and value != expected_value:
            return "differed"
    if None not in values:
        return "agreed"
    has_failed = any(map(_has_failed, _rows_of(labels, "monte_carlo")))
    return "failed" if has_failed else "not_continued"


def _has_failed(row: Labels) -> bool:
    """Whether a row of Monte Carlo's, or the continuations of one of its steps, failed."""
    if row.error is not None:
        return True
    return any(step.num_rollouts is not None and step.label is None and step.value is None for step in row.steps)


def checked_consensus_counts(solutions: Iterable[tuple[Sequence[Labels], int, bool | None]]) -> dict[str, float]:
    """The number of `solutions` (labels, number of steps, whether the answer is right) of each `ConsensusStatus`.

    Raises ValueError where Monte Carlo ran in such a way that it settles none of those without a right answer: what is
    left then holds no wrong step.
    """
    statuses: list[ConsensusStatus] = []
    of_unsolved: Counter[ConsensusStatus] = Counter()
    for labels, num_steps, correct in solutions:
        status = consensus_status(labels, num_steps, correct)
        statuses.append(status)
        if not correct:
            of_unsolved[status] += 1
    if of_unsolved["not_continued"] and not of_unsolved["agreed"] + of_unsolved["differed"]:
        raise ValueError(
            f"label policy 'consensus' needs Monte Carlo on every step up to the judge's first wrong one; of "
            f"{of_unsolved['not_continued']:,} judged solutions without a right answer it has that on none. Run "
            "monte_carlo with mode=verify, first_error or all, or take 'hybrid'."
        )
    return consensus_counts(statuses)


def consensus_counts(statuses: Iterable[ConsensusStatus]) -> dict[str, float]:
    """How many there are of each `ConsensusStatus`, as figures ``consensus_<status>``."""
    counts = Counter(statuses)
    return {f"consensus_{status}": float(counts[status]) for status in get_args(ConsensusStatus)}


def describe_consensus(figures: Mapping[str, float]) -> str:
    """The figures of `consensus_counts` in a sentence."""
    agreed, differed, not_judged, not_continued, failed = (
        int(figures[f"consensus_{status}"]) for status in get_args(ConsensusStatus)
    )
    reasons = {
        "not judged": not_judged,
        "without Monte Carlo on every step that it needs": not_continued,
        "with failed continuations": failed,
    }
    causes = []
    for reason, count in reasons.items():
        if count:
            causes.append(f"{count:,} {reason}")
    why = ", ".join(causes)
    sentence = f"judge and Monte Carlo agree on {agreed:,} solutions and differ on {differed:,}"
    if not why:
        return sentence
    return f"{sentence}; {sum(reasons.values()):,} cannot be settled ({why})"


def outcome(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """The last step alone, right where the final answer is; nothing where no answer was found."""
    last = None if answer.correct is None else float(answer.correct)
    without_label: list[Target] = [None] * (num_steps - 1)
    return [*without_label, last][:num_steps]


def tree_search(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """MedS3's hard look-back labels; nothing where no tree holds the solution."""
    return _of_source(labels, "tree_search", num_steps)


def tree_search_soft(labels: Sequence[Labels], num_steps: int, answer: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """What the tree holds of each prefix itself as the target (MedS3's first release)."""
    return _values(labels, "tree_search", num_steps)


POLICIES: dict[str, Callable[[Sequence[Labels], int, AnswerOutcome], list[Target]]] = {
    "judge": judge,
    "monte_carlo": monte_carlo,
    "hybrid": hybrid,
    "consensus": consensus,
    "soft": soft,
    "advantage": advantage,
    "outcome": outcome,
    "tree_search": tree_search,
    "tree_search_soft": tree_search_soft,
}
