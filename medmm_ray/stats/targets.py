"""From label rows to training targets: the label policies, by name, as pure functions.

Enters: one solution's label rows, of any sources, side by side. Leaves: one target a step, the probability that the
step is right, or None where it is not trained on. A judge's and an expert's label is about the step itself; Monte
Carlo's value is about the prefix that ends there.

A step that nobody looked at is an empty `StepLabel` and is no target; a *neutral* step (looked at, nothing checkable in
it: a confidence or a reason, but no label and no value) trains as right, unless it follows the first error.

| policy | a step's target | `after_first_error` |
|---|---|---|
| judge | the judge's verdict | collapse (Med-PRM), keep or drop (Qwen) |
| monte_carlo | VisualPRM's value label: can the right answer be reached from here? | keep (VisualPRM), or any |
| hybrid | an expert's word, else monte_carlo where it ran, else the judge's | any |
| consensus | the judge's, of solutions in which Monte Carlo sees the same first error (a right answer: none) | any |
| soft | as hybrid, with Monte Carlo's ratio itself | any |
| advantage | VisualPRM's: did this step raise (1) or lower (0) the ratio? as it was: not trained on | keep alone |
| outcome | the last step alone, by the answer | means nothing |
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
    usable = [row for row in labels if row.error is None]
    for row in usable:
        if len(row.steps) != num_steps:
            raise ValueError(
                f"{row.source} labels of solution {row.solution_id} (question {row.question_id}, annotator "
                f"{row.annotator}) are {len(row.steps)} for {num_steps} steps; they belong to another text"
            )
        values = [step.value for step in row.steps if step.value is not None]
        strange = [value for value in values if not 0 <= value <= 1]
        if strange:
            raise ValueError(
                f"{row.source} labels of solution {row.solution_id} (question {row.question_id}, annotator "
                f"{row.annotator}) have the value {strange[0]}; expected numbers from 0 to 1: label the solution again"
            )
    if policy == "advantage" and after_first_error != "keep":
        raise ValueError(
            f"label policy 'advantage' needs after_first_error='keep', not {after_first_error!r}: a step that lowers "
            "the chances says nothing of the steps behind it"
        )
    return _after_first_error(POLICIES[policy](usable, num_steps, AnswerOutcome(correct, accuracy)), after_first_error)


def labels_by_solution(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Labels]]:
    """Plain rows of one or several labels tables as records, grouped by solution."""
    grouped: dict[str, list[Labels]] = {}
    for row in rows:
        record = Labels(**{**row, "steps": [StepLabel(**step) for step in row["steps"]]})
        grouped.setdefault(record.solution_id, []).append(record)
    return grouped


def accuracy_of(solutions: Iterable[Mapping[str, Any]]) -> float | None:
    """What share of a question's answers is right; None where there is no answer."""
    ends = [solution["correct"] for solution in solutions if solution["correct"] is not None]
    return sum(ends) / len(ends) if ends else None


def _after_first_error(values: list[Target], rule: str) -> list[Target]:
    first = next((i for i, value in enumerate(values) if value == 0.0), None)
    if first is None or rule == "keep":
        return values
    if rule not in ("collapse", "drop"):
        raise ValueError(f"after_first_error is {rule!r}; it must be collapse, keep or drop")
    after: Target = 0.0 if rule == "collapse" else None
    return [*values[: first + 1], *[after] * (len(values) - first - 1)]


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
    ordered = sorted(rows, key=lambda row: row.annotator)
    last_word = [row for row in ordered if row.annotator == ADJUDICATOR]
    return [_merged_step([row.steps[i] for row in last_word], [row.steps[i] for row in ordered])
            for i in range(num_steps)]  # fmt: skip


def _merged_step(last_word: Sequence[StepLabel], everyone: Sequence[StepLabel]) -> StepLabel:
    said = [step for step in last_word if _hard(step) is not None or _is_neutral(step)]
    entries = said or everyone
    right, wrong = ([step for step in entries if _hard(step) == verdict] for verdict in (1.0, 0.0))
    if right or wrong:
        return StepLabel() if len(right) == len(wrong) else max(right, wrong, key=len)[0]
    return next((step for step in entries if _is_neutral(step)), StepLabel())


def _from(
    labels: Sequence[Labels], source: str, num_steps: int, read: Callable[[StepLabel], Target] = _verdict
) -> list[Target]:
    """What one source says of each step, its annotators merged (`merge_annotators`)."""
    return [read(step) for step in merge_annotators([row for row in labels if row.source == source], num_steps)]


def _first_of(*columns: list[Target]) -> list[Target]:
    """For each step the first source that has something to say."""
    return [next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)]


def judge(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """The judge's verdicts."""
    return _from(labels, "judge", num_steps)


def monte_carlo(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """1 where any continuation from the step was right; None where Monte Carlo did not run."""
    return _from(labels, "monte_carlo", num_steps, _hard)


def hybrid(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:
    """An expert's word, else Monte Carlo where it ran, else the judge's."""
    return _first_of(
        _from(labels, "expert", num_steps), monte_carlo(labels, num_steps, ending), _from(labels, "judge", num_steps)
    )


def soft(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """As `hybrid`, with Monte Carlo's fraction itself as the target.

    Raises ValueError where Monte Carlo stopped early: the fraction is then too high.
    """
    return _first_of(
        _from(labels, "expert", num_steps), _ratios("soft", labels, num_steps), _from(labels, "judge", num_steps)
    )


def advantage(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:
    """1 where a step raised Monte Carlo's fraction over the step before, 0 where it lowered it, else None.

    The first step is compared with the accuracy of the question's solutions. A step that left the fraction as it was is
    not trained on (one that stays at 1.0 is not bad), nor is one that has no fraction, or whose predecessor has none.

    Raises ValueError where Monte Carlo stopped early: the fraction is then too high.
    """
    values = _ratios("advantage", labels, num_steps)
    return [
        None if value is None or before is None or value == before else float(value > before)
        for before, value in zip([ending.accuracy, *values[:-1]], values, strict=True)
    ]


def _ratios(policy: str, labels: Sequence[Labels], num_steps: int) -> list[Target]:
    """Monte Carlo's fraction at each step; refused where a step's draws ended when its label was known."""
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
    columns = zip(*(row.steps for row in labels if row.source == source), strict=True)
    known = [[step.value for step in column if step.value is not None] for column in columns] or [[]] * num_steps
    return [sum(values) / len(values) if values else None for values in known]


def consensus(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:
    """The judge's verdicts of a solution where judge and Monte Carlo agree on the first wrong step, else nothing."""
    agreed = consensus_status(labels, num_steps, ending.correct) == "agreed"
    return judge(labels, num_steps, ending) if agreed else [None] * num_steps


def consensus_status(labels: Sequence[Labels], num_steps: int, correct: bool | None) -> ConsensusStatus:
    """Whether judge and Monte Carlo agree on a solution's first wrong step, or that there is none; else why not.

    They agree where Monte Carlo finds every step before the judge's first wrong one right, and that one wrong; what
    comes behind it does not matter. A right answer is itself a continuation of each of its prefixes that came out
    right: where Monte Carlo says nothing of a step, it says that no step is wrong yet. Without a right answer nobody
    knows where Monte Carlo did not run on one of these steps (`not_continued`), or where its row or its continuations
    failed there (`failed`); and nowhere without the judge's verdict on each step (`not_judged`).
    """
    usable = [row for row in labels if row.error is None]
    judged, rolled = _from(usable, "judge", num_steps), _from(usable, "monte_carlo", num_steps, _hard)
    if None in judged:
        return "not_judged"
    first = next((i for i, value in enumerate(judged) if value == 0.0), num_steps)
    expected = [*[1.0] * first, 0.0][:num_steps]
    found = [1.0 if value is None and correct else value for value in rolled[: len(expected)]]
    if any(value not in (None, agreed) for value, agreed in zip(found, expected, strict=True)):
        return "differed"
    if None not in found:
        return "agreed"
    failed = any(
        row.error is not None
        or any(s.num_rollouts is not None and s.label is None and s.value is None for s in row.steps)
        for row in labels
        if row.source == "monte_carlo"
    )
    return "failed" if failed else "not_continued"


def checked_consensus_counts(solutions: Iterable[tuple[Sequence[Labels], int, bool | None]]) -> dict[str, float]:
    """The number of `solutions` (labels, number of steps, whether the answer is right) of each `ConsensusStatus`.

    Raises ValueError where Monte Carlo ran in such a way that it settles none of those without a right answer: what is
    left then holds no wrong step.
    """
    found = [(consensus_status(labels, num_steps, correct), correct) for labels, num_steps, correct in solutions]
    of_others = Counter(settled for settled, correct in found if not correct)
    if of_others["not_continued"] and not of_others["agreed"] + of_others["differed"]:
        raise ValueError(
            f"label policy 'consensus' needs Monte Carlo on every step up to the judge's first wrong one; of "
            f"{of_others['not_continued']:,} judged solutions without a right answer it has that on none. Run "
            "monte_carlo with mode=verify, first_error or all, or take 'hybrid'."
        )
    return consensus_counts(settled for settled, _ in found)


def consensus_counts(found: Iterable[ConsensusStatus]) -> dict[str, float]:
    """How many there are of each."""
    counts = Counter(found)
    return {f"consensus_{name}": float(counts[name]) for name in get_args(ConsensusStatus)}


def describe_consensus(figures: Mapping[str, float]) -> str:
    """`consensus_counts` in a sentence."""
    agreed, differed, *others = (int(figures[f"consensus_{name}"]) for name in get_args(ConsensusStatus))
    reasons = ("not judged", "without Monte Carlo on every step that it needs", "with failed continuations")
    why = ", ".join(f"{number:,} {reason}" for number, reason in zip(others, reasons, strict=True) if number)
    told = f"judge and Monte Carlo agree on {agreed:,} solutions and differ on {differed:,}"
    return f"{told}; {sum(others):,} cannot be settled ({why})" if why else told


def outcome(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """The last step alone, right where the final answer is; nothing where no answer was found."""
    return [*[None] * (num_steps - 1), None if ending.correct is None else float(ending.correct)][:num_steps]


def tree_search(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
    """MedS3's hard look-back labels; nothing where no tree holds the solution."""
    return _from(labels, "tree_search", num_steps)


def tree_search_soft(labels: Sequence[Labels], num_steps: int, ending: AnswerOutcome) -> list[Target]:  # noqa: ARG001
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
