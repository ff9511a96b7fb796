"""A `BenchmarkTable` -> benchmarks.html, benchmarks.md, and the table for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.pages.report import ends, pages, percent
from medmm_ray.stats.grouped_stats import Figure
from medmm_ray.steps.evaluate.benchmark_table import BenchmarkTable, Column

METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "processbench_f1": "ProcessBench F1",
    "prm_score": "PRMScore",
}


def render(table: BenchmarkTable) -> str:
    """The page."""
    env = pages()
    env.filters |= {"ends": ends}
    return env.get_template("benchmarks.html.j2").render(t=table, metric=METRICS[table.metric])


def markdown(table: BenchmarkTable) -> str:
    """The table in Markdown, for a README; published figures are in italics."""
    names = [f"*{column.name}, published*" if column.is_published else _name(column) for column in table.columns]
    lines = [
        _row([METRICS[table.metric], "n", *names]),
        _row(["---", "---:", *["---:"] * len(names)]),
    ]
    for row in table.rows:
        cells = []
        for column in table.columns:
            figure = column.figures.get(row)
            words = percent(figure.value) if figure else "–"
            interval = f" ({ends(figure)})" if figure and figure.low is not None else ""
            cells.append(f"*{words}*" if column.is_published and figure else f"{words}{interval}")
        lines.append(_row([row, table.num_questions(row), *cells]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(column: Column) -> str:
    return f"{column.owner}: {column.name}"


def summary(table: BenchmarkTable) -> RenderableType:
    """The table for a terminal, a line a column: there are more ways to answer than fit beside each other."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column(METRICS[table.metric])
    for row in table.rows:
        number = table.num_questions(row)
        grid.add_column(f"{row} ({number})" if number else row, justify="right")
    for column in table.columns:
        style = "italic dim" if column.is_published else ""
        name = f"{column.name} (published)" if column.is_published else _name(column)
        grid.add_row(name, *[_cell(column.figures.get(row)) for row in table.rows], style=style)
    return Group(Text(f"{table.title}; {table.source}" if table.source else table.title), grid)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return percent(figure.value) if figure.low is None else f"{percent(figure.value)} ({ends(figure)})"
