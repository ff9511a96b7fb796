"""From label rows to training targets: the label policies, by name, as pure functions.

Enters: one solution's label rows, of any sources, side by side. Leaves: one target a step, the probability that the
step is right, or None where it is not trained on. A judge's and an expert's label is about the step itself; Monte
Carlo's value is about the prefix that ends there.

A step that nobody looked at is an empty `StepLabel` and is no target; a *neutral* step (looked at, nothing checkable in
it: a confidence or a reason, but no label and no value) trains as right, unless it follows the first error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from medmm_ray.records import Labels, StepLabel

LabelPolicy = Literal[
    "judge", "monte_carlo", "hybrid", "consensus", "soft", "outcome", "tree_search", "tree_search_soft"
]
AfterFirstError = Literal["collapse", "keep", "drop"]
Target = float | None

ADJUDICATOR = "adjudicator"


def targets(
    policy: str,
    labels: Sequence[Labels],
    num_steps: int,
    after_first_error: str = "collapse",
    correct: bool | None = None,
) -> list[Target]:
    """The training targets of one solution of `num_steps` steps, each in [0, 1] or None (not trained on).

    `policy` is one of `POLICIES`; `after_first_error` sets the steps behind the first target of 0: ``collapse`` to 0
    (Med-PRM), ``keep`` as labelled (VisualPRM) or ``drop`` (Qwen). `correct` says whether the final answer is right,
    for ``outcome``. Rows with an error are not labels.

    Raises ValueError for labels that do not match the steps in number, with the ids.
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
    return _after_first_error(POLICIES[policy](usable, num_steps, correct), after_first_error)


def labels_by_solution(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Labels]]:
    """Plain rows of one or several labels tables as records, grouped by solution."""
    grouped: dict[str, list[Labels]] = {}
    for row in rows:
        record = Labels(**{**row, "steps": [StepLabel(**step) for step in row["steps"]]})
        grouped.setdefault(record.solution_id, []).append(record)
    return grouped


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


def _value(step: StepLabel) -> Target:
    return step.value


def _from(
    labels: Sequence[Labels], source: str, num_steps: int, read: Callable[[StepLabel], Target] = _verdict
) -> list[Target]:
    """What one source says of each step; several annotators: the adjudicator, else the majority, a tie is no label."""
    rows = [row for row in labels if row.source == source]
    rows = [row for row in rows if row.annotator == ADJUDICATOR] or rows
    merged: list[Target] = []
    for i in range(num_steps):
        votes = [vote for row in rows if (vote := read(row.steps[i])) is not None]
        mean = sum(votes) / len(votes) if votes else None
        if mean is not None and read is not _value:
            mean = None if mean == 0.5 else float(mean > 0.5)
        merged.append(mean)
    return merged


def _first_of(*columns: list[Target]) -> list[Target]:
    """For each step the first source that has something to say."""
    return [next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)]


def judge(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """The judge's verdicts."""
    return _from(labels, "judge", num_steps)


def monte_carlo(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """1 where any continuation from the step was right; None where Monte Carlo did not run."""
    return _from(labels, "monte_carlo", num_steps, _hard)


def hybrid(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """An expert's word, else Monte Carlo where it ran, else the judge's."""
    return _first_of(
        _from(labels, "expert", num_steps), monte_carlo(labels, num_steps), _from(labels, "judge", num_steps)
    )


def soft(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """As `hybrid`, with Monte Carlo's fraction itself as the target."""
    return _first_of(
        _from(labels, "expert", num_steps),
        _from(labels, "monte_carlo", num_steps, _value),
        _from(labels, "judge", num_steps),
    )


def consensus(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """The judge's verdicts of a solution where judge and Monte Carlo agree on the first wrong step, else nothing.

    Raises ValueError where Monte Carlo did not run on the whole solution: its first wrong step is then unknown.
    """
    judged, rolled = judge(labels, num_steps), monte_carlo(labels, num_steps)
    if None in judged:
        return [None] * num_steps
    if None in rolled:
        ids = sorted({row.solution_id for row in labels}) or ["?"]
        raise ValueError(
            f"label policy 'consensus' needs Monte Carlo on every step; solution {ids[0]} has it on "
            f"{num_steps - rolled.count(None)} of {num_steps}. Run monte_carlo on whole solutions, or take 'hybrid'."
        )
    return judged if _first_error(judged) == _first_error(rolled) else [None] * num_steps


def _first_error(values: Sequence[Target]) -> int | None:
    return next((i for i, value in enumerate(values) if value == 0.0), None)


def outcome(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """The last step alone, right where the final answer is; nothing where no answer was found."""
    return [*[None] * (num_steps - 1), None if correct is None else float(correct)][:num_steps]


def tree_search(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """MedS3's hard look-back labels; nothing where no tree holds the solution."""
    return _from(labels, "tree_search", num_steps)


def tree_search_soft(labels: Sequence[Labels], num_steps: int, correct: bool | None = None) -> list[Target]:  # noqa: ARG001
    """What the tree holds of each prefix itself as the target (MedS3's first release)."""
    return _from(labels, "tree_search", num_steps, _value)


POLICIES: dict[str, Callable[[Sequence[Labels], int, bool | None], list[Target]]] = {
    "judge": judge,
    "monte_carlo": monte_carlo,
    "hybrid": hybrid,
    "consensus": consensus,
    "soft": soft,
    "outcome": outcome,
    "tree_search": tree_search,
    "tree_search_soft": tree_search_soft,
}
