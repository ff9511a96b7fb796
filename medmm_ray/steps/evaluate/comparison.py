"""Two reports and their outcomes -> what is different: figures with their significance, settings, questions.

Only questions that both runs have are compared, pair by pair. Arms of another name in the second run are compared by
nothing; a figure is at the largest N that both have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.stats.clusters import clusters_of
from medmm_ray.stats.grouped_stats import easy_first
from medmm_ray.stats.metrics import Ints
from medmm_ray.stats.paired import PairedDifference, holm, paired_differences
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate.outcomes import COLUMNS, chance_columns, chances_of
from medmm_ray.steps.evaluate.report import EvaluationReport
from medmm_ray.steps.evaluate.steps import StepFigures

STEP_FIGURES = ("auroc", "macro_f1", "ece", "kappa", "minimum_on_last_step")
MOST_CHANGED = 10
"""Questions that are named."""


@dataclass(frozen=True)
class Run:
    """A run as it is compared: its name, its report, its table of outcomes."""

    name: str
    report: EvaluationReport
    outcomes: pa.Table


@dataclass(frozen=True)
class Change:
    """A setting or figure that is not the same; None where a run does not have it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class ChangedQuestion:
    """A question on which the two differ by most: its chances by the figure that matters, and what each answers."""

    question_id: str
    dataset: str
    answer: str
    first_chance: float
    second_chance: float
    first_answer: str | None
    second_answer: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the second run does otherwise than the first."""

    first: str
    second: str
    n: int
    questions: int
    only_in_first: int
    only_in_second: int
    main: str
    """The figure that groups and questions are compared by: best-of-N of the main arm, else the majority."""
    figures: dict[str, PairedDifference]
    """By name, as ``best_of_n/multimodal``; tested together."""
    groups: dict[str, dict[str, PairedDifference]]
    """The main figure by what questions are grouped by and group; each grouping is tested together."""
    settings: list[Change]
    steps: list[Change]
    """Step metrics, by arm."""
    changed_questions: list[ChangedQuestion]


def compare(first: Run, second: Run, resampling: Resampling) -> Comparison:
    """The comparison. Raises ValueError where the runs share no question, or no N."""
    # Accuracy grows with N: figures at another N are no comparison.
    n = _common_n(first, second)
    first_rows, second_rows = _shared_rows(first, second)
    columns = _common_columns(
        first_rows,
        second_rows,
        n,
    )
    names = [column.removesuffix(f"/{n}") for column in columns]
    # Each run knows the clusters of all its questions, of which some may be missing here.
    clusters_Q = _clusters(first_rows, second_rows)
    first_QK = chances_of(first_rows, columns)
    second_QK = chances_of(second_rows, columns)
    figures = paired_differences(
        first_QK,
        second_QK,
        clusters_Q,
        resampling,
    )
    main = _main_figure(names)
    place = names.index(main)
    groups = {}
    for column in COLUMNS:
        table = _by_group(
            first_rows[column].to_pylist(),
            first_QK[:, [place]],
            second_QK[:, [place]],
            clusters_Q,
            resampling,
        )
        if len(table) > 1:
            groups[column] = table
    return Comparison(
        first=first.name,
        second=second.name,
        n=n,
        questions=first_rows.num_rows,
        only_in_first=first.outcomes.num_rows - first_rows.num_rows,
        only_in_second=second.outcomes.num_rows - second_rows.num_rows,
        main=main,
        figures=dict(
            zip(
                names,
                figures,
                strict=True,
            )
        ),
        groups=groups,
        settings=changes(first.report.settings, second.report.settings),
        steps=_step_changes(first.report.step, second.report.step),
        changed_questions=_changed_questions(
            first_rows,
            second_rows,
            main,
            columns[place],
        ),
    )


def _common_n(first: Run, second: Run) -> int:
    shared = set(first.report.ns) & set(second.report.ns)
    if not shared:
        raise ValueError(
            f"{first.name} has figures at N = {first.report.ns} and {second.name} at {second.report.ns}: none in "
            "common; evaluate one of them again with evaluate.ns=[...] of the other"
        )
    return max(shared)


def _shared_rows(first: Run, second: Run) -> tuple[pa.Table, pa.Table]:
    """The rows of the questions that both have, in the same order."""
    shared = pc.is_in(first.outcomes["question_id"], second.outcomes["question_id"].combine_chunks())
    first_rows = first.outcomes.filter(shared).sort_by("question_id")
    if not first_rows.num_rows:
        raise ValueError(
            f"{first.name} ({first.outcomes.num_rows:,} questions) and {second.name} ({second.outcomes.num_rows:,}) "
            "have no question in common; compare runs on the same data and split"
        )
    shared = pc.is_in(second.outcomes["question_id"], first_rows["question_id"].combine_chunks())
    return first_rows, second.outcomes.filter(shared).sort_by("question_id")


def _common_columns(first: pa.Table, second: pa.Table, n: int) -> list[str]:
    """The columns with chances at N, or of one sample, that both have."""
    names = set(chance_columns(second))
    at_n = [name for name in chance_columns(first) if name.rpartition("/")[2] in (str(n), "one_sample")]
    return [name for name in at_n if name in names]


def _clusters(first: pa.Table, second: pa.Table) -> Ints:
    keys = []
    for in_first, in_second in zip(
        first["cluster"].to_pylist(),
        second["cluster"].to_pylist(),
        strict=True,
    ):
        keys.append([f"first {in_first}", f"second {in_second}"])
    return clusters_of(keys)


def _main_figure(names: Sequence[str]) -> str:
    # The first arm is the scorer where there is no image.
    best = [name for name in names if name.startswith("best_of_n/")]
    if "best_of_n/multimodal" in best:
        return "best_of_n/multimodal"
    return best[0] if best else "majority"


def _by_group(
    group_of_row: Sequence[str], first_Q1: Any, second_Q1: Any, clusters_Q: Ints, resampling: Resampling
) -> dict[str, PairedDifference]:
    labels = np.array(group_of_row, dtype=object)
    table = {}
    for name in sorted(set(group_of_row) - {""}, key=easy_first):
        rows = np.flatnonzero(labels == name)
        figures = paired_differences(
            first_Q1[rows],
            second_Q1[rows],
            clusters_Q[rows],
            resampling,
        )
        table[name] = figures[0]
    # A group of a single cluster has no p-value, and takes no part.
    tested = {name: figure.p_value for name, figure in table.items() if figure.p_value is not None}
    for name, adjusted_p in zip(
        tested,
        holm(list(tested.values())).tolist(),
        strict=True,
    ):
        table[name] = replace(table[name], adjusted_p=adjusted_p)
    return table


def changes(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """The settings that differ, by their whole names, as sample.temperature."""
    differences: list[Change] = []
    for name in dict.fromkeys((*first, *second)):
        before, after = first.get(name), second.get(name)
        # A section that one run lacks is one change, not one for each of its settings.
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += changes(before, after, f"{prefix}{name}.")
        elif before != after:
            differences.append(Change(f"{prefix}{name}", before, after))
    return differences


def _step_changes(first: Mapping[str, StepFigures], second: Mapping[str, StepFigures]) -> list[Change]:
    differences = []
    for arm in first.keys() & second.keys():
        for name in STEP_FIGURES:
            before, after = getattr(first[arm], name), getattr(second[arm], name)
            if before != after:
                differences.append(Change(f"{name}/{arm}", before, after))
    return sorted(differences, key=lambda change: change.name)


def _changed_questions(first: pa.Table, second: pa.Table, main: str, column: str) -> list[ChangedQuestion]:
    """The questions whose chance changes most, those that got worse and better in turn."""
    before, after = first[column].to_numpy(), second[column].to_numpy()
    answers = f"answer/{main.partition('/')[2] or 'majority'}"
    change = after - before
    order = np.argsort(-np.abs(change), kind="stable")
    # Losses matter more to who decides: they come first.
    better = [row for row in order.tolist() if change[row] > 0][:MOST_CHANGED]
    worse = [row for row in order.tolist() if change[row] < 0][:MOST_CHANGED]
    entries = []
    for row in (*worse, *better):
        entry = ChangedQuestion(
            question_id=first["question_id"][row].as_py(),
            dataset=first["dataset"][row].as_py(),
            answer=first["answer"][row].as_py(),
            first_chance=float(before[row]),
            second_chance=float(after[row]),
            first_answer=first[answers][row].as_py(),
            second_answer=second[answers][row].as_py(),
        )
        entries.append(entry)
    return entries
