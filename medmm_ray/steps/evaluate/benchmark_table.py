"""Runs and published systems side by side, a row a benchmark: what this run, its baselines and the papers have.

A run's columns are its ways to choose an answer at its largest N; of a benchmark of reward models, which brings its own
solutions, the arms. Published columns are marked as theirs. Means are over the benchmarks that a column has all of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medmm_ray.stats.grouped_stats import Figure
from medmm_ray.steps.evaluate.accuracy import GroupAccuracy
from medmm_ray.steps.evaluate.published import TABLES, Metric, PublishedTable
from medmm_ray.steps.evaluate.report import EvaluationReport
from medmm_ray.steps.evaluate.step_groups import ALL, GroupStepFigures

MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """One way to answer: its name, whose it is ("published": a paper's), and its figure by row."""

    name: str
    owner: str
    figures: Mapping[str, Figure]

    @property
    def is_published(self) -> bool:
        """Whether the figures are a paper's, not measured here."""
        return self.owner == PUBLISHED


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """The rows are benchmarks, where they have kinds of their own ``<benchmark>: <kind>``, and the mean."""

    title: str
    source: str
    metric: Metric
    rows: Sequence[str]
    questions: Mapping[str, int]
    """By row: the questions, or labelled solutions, that the first run has."""
    sizes: Mapping[str, int]
    """By row: the questions that the benchmark has, where that is known: a sample of them is no benchmark."""
    columns: Sequence[Column]

    def num_questions(self, row: str) -> str:
        """How many of a row's questions were measured, in words; empty where none was."""
        number, size = self.questions.get(row), self.sizes.get(row)
        if number is None:
            return ""
        return f"{number:,}" if size in (None, number) else f"{number:,} of {size:,}"


PUBLISHED = "published"


def table_of(name: str) -> PublishedTable:
    """The table of a name, or one of the benchmarks that are named with commas between them."""
    if name in TABLES:
        return TABLES[name]
    data_sets = tuple(filter(None, name.split(",")))
    # Benchmarks of reward models are measured by their own figure.
    for table in TABLES.values():
        if table.metric != "accuracy" and data_sets == tuple(table.data_sets):
            return table
    systems = []
    # A paper's row stands beside any choice of its benchmarks.
    for table in TABLES.values():
        for system in table.systems:
            figures = {data_set: value for data_set, value in system.figures.items() if data_set in data_sets}
            if table.metric == "accuracy" and figures:
                systems.append(replace(system, name=f"{system.name} ({table.title})", figures=figures))
    return PublishedTable(title=", ".join(data_sets), source="", data_sets=data_sets, systems=tuple(systems))


def benchmark_table(
    published: PublishedTable, runs: Mapping[str, EvaluationReport], sizes: Mapping[str, int]
) -> BenchmarkTable:
    """The table of some evaluated runs, by their names: the first is the one that it is about.

    `sizes` are the questions of the benchmarks' test sets, as far as they are known.
    """
    columns: list[Column] = []
    questions: dict[str, int] = {}
    for name, report in runs.items():
        by_column = (
            _accuracies(report, published) if published.metric == "accuracy" else _step_columns(report, published)
        )
        for column, (figures, counts) in by_column.items():
            columns.append(Column(column, name, figures))
            questions = {**counts, **questions}
    for system in published.systems:
        figures = {data_set: Figure(value, None, None) for data_set, value in system.figures.items()}
        columns.append(Column(system.name, PUBLISHED, figures))
    rows = _rows(published, columns)
    return BenchmarkTable(
        title=published.title,
        source=published.source,
        metric=published.metric,
        rows=[*rows, MEAN] if len(published.data_sets) > 1 else rows,
        questions=questions,
        sizes={row: sizes[row] for row in rows if row in sizes},
        columns=[_with_mean(column, published.data_sets) for column in columns],
    )


_Counted = tuple[dict[str, Figure], dict[str, int]]


def _accuracies(report: EvaluationReport, published: PublishedTable) -> dict[str, _Counted]:
    columns: dict[str, _Counted] = {}
    for data_set in published.data_sets:
        group = report.by_dataset.get(data_set)
        if group is None:
            continue
        for name, figure in _ways(group, report.n).items():
            figures, counts = columns.setdefault(name, ({}, {}))
            figures[data_set], counts[data_set] = figure, group.questions
    return columns


def _ways(group: GroupAccuracy, n: int) -> dict[str, Figure]:
    """The figures of one group by the way in which an answer is chosen."""
    ways: dict[str, Figure] = {
        "one sample": _plain(group.one_sample),
        f"majority of {n}": _plain(group.majority),
    }
    for arm in group.best_of_n:
        words = arm.replace("_", " ")
        ways[f"best of {n}, {words}"] = _plain(group.best_of_n[arm])
        ways[f"SC+RM of {n}, {words}"] = _plain(group.sc_rm[arm])
    return ways


def _plain(figure: Figure) -> Figure:
    # As it is read back from benchmarks.json.
    return Figure(figure.value, figure.low, figure.high)


def _step_columns(report: EvaluationReport, published: PublishedTable) -> dict[str, _Counted]:
    columns: dict[str, _Counted] = {}
    for arm, by_data_set in report.step_by_dataset.items():
        figures: dict[str, Figure] = {}
        counts: dict[str, int] = {}
        for data_set in published.data_sets:
            for kind, group in by_data_set.get(data_set, {}).items():
                # All of it first, then the benchmark's own kinds of error.
                row = data_set if kind == ALL else f"{data_set}: {kind}"
                figures[row] = Figure(_step_figure(group, published.metric), None, None)
                counts[row] = group.solutions
        if figures:
            columns[arm.replace("_", " ")] = (figures, counts)
    return columns


def _step_figure(group: GroupStepFigures, metric: Metric) -> float | None:
    # PRMScore is the macro-F1 of the steps of a kind of error.
    return group.processbench.f1 if metric == "processbench_f1" else group.macro_f1


def _rows(published: PublishedTable, columns: Sequence[Column]) -> list[str]:
    """The benchmarks that any column has, in the table's order, each with its kinds behind it."""
    present: dict[str, None] = {}
    for column in columns:
        present |= dict.fromkeys(column.figures)
    rows = []
    for data_set in published.data_sets:
        rows += [row for row in present if row == data_set or row.startswith(f"{data_set}: ")]
    return rows


def _with_mean(column: Column, data_sets: Sequence[str]) -> Column:
    values = [column.figures[data_set].value for data_set in data_sets if data_set in column.figures]
    defined = [value for value in values if value is not None]
    # A mean of some would be read as one of all.
    if len(defined) < len(data_sets):
        return column
    mean = Figure(sum(defined) / len(defined), None, None)
    return replace(column, figures={**column.figures, MEAN: mean})
