"""A `Comparison` -> comparison.html (one self-contained page), and its table for a terminal."""

from collections.abc import Mapping

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.pages.forest import Whisker, forest
from medmm_ray.pages.report import pages, percent
from medmm_ray.pages.svg import BLUE, GREY, ORANGE
from medmm_ray.stats.paired import PairedDifference
from medmm_ray.steps.evaluate.comparison import Comparison

SIGNIFICANT = 0.05
NAMES = {"one_sample": "one sample", "majority": "majority vote", "oracle": "oracle"}
DECODER_NAMES = {"best_of_n": "best of N", "sc_rm": "weighted vote"}


def render(comparison: Comparison) -> str:
    """The page."""
    env = pages()
    env.filters |= {"points": points, "p": p_text}
    return env.get_template("comparison.html.j2").render(
        c=comparison,
        lead=lead(comparison),
        figures=_forest(comparison.figures, "Difference by figure"),
        groups={name: _forest(table, f"Difference by {name}") for name, table in comparison.groups.items()},
        figure_name=figure_name,
    )


def figure_name(name: str) -> str:
    """A figure's path in words: best_of_n/text_only is "best of N, text only"."""
    decoder, _, arm = name.partition("/")
    return f"{DECODER_NAMES[decoder]}, {arm.replace('_', ' ')}" if arm else NAMES.get(decoder, decoder)


def points(value: float | None) -> str:
    """A difference of shares in points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def p_text(value: float | None) -> str:
    """A p-value as papers write it."""
    if value is None:
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def lead(comparison: Comparison) -> str:
    """One sentence: what became of the main figure, and whether chance alone may have made it."""
    figure = comparison.figures[comparison.main]
    name = figure_name(comparison.main).replace("best", "Best").replace("majority", "Majority")
    change = f"{percent(figure.first)} to {percent(figure.second)} ({points(figure.difference)} points"
    # Without an interval nothing can be said of chance.
    if figure.low is None:
        return f"{name} goes from {change}, of a single group of questions: no interval)."
    interval = f"95\u00a0% interval {points(figure.low)} to {points(figure.high)}, p {p_text(figure.p_value)}"
    verdict = "more than chance makes" if _is_significant(figure) else "no more than chance may make"
    return f"{name} goes from {change}, {interval}): {verdict}."


def _is_significant(figure: PairedDifference) -> bool:
    return figure.adjusted_p is not None and figure.adjusted_p < SIGNIFICANT


def _forest(figures: Mapping[str, PairedDifference], label: str) -> Markup:
    rows: list[Whisker | str] = []
    # A range of its own for each chart, at least a point either way.
    reach = 1.0
    for name, figure in figures.items():
        # Colour is kept for what stands after the adjustment.
        colour = GREY
        if _is_significant(figure):
            colour = BLUE if figure.difference > 0 else ORANGE
        ends = [100 * end for end in (figure.low, figure.high) if end is not None]
        reach = max([reach, abs(100 * figure.difference), *map(abs, ends)])
        low, high = ends or (None, None)
        # A group's name is no path of a figure.
        words = figure_name(name) if "/" in name or name in NAMES else name
        note = points(figure.difference)
        rows.append(
            Whisker(
                words,
                100 * figure.difference,
                low,
                high,
                note,
                colour,
            )
        )
    return forest(
        rows,
        (-reach, reach),
        False,
        "second minus first, points",
        label,
    )


def summary(comparison: Comparison) -> RenderableType:
    """The figures and changed settings for a terminal."""
    table = Table(
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    table.add_column(f"accuracy, N = {comparison.n}")
    for column in (comparison.first, comparison.second, "points", "95 % interval", "p", "p, adjusted"):
        table.add_column(column, justify="right")
    for name, figure in comparison.figures.items():
        interval = "–" if figure.low is None else f"{points(figure.low)} – {points(figure.high)}"
        table.add_row(
            figure_name(name),
            percent(figure.first),
            percent(figure.second),
            points(figure.difference),
            interval,
            p_text(figure.p_value),
            p_text(figure.adjusted_p),
            style="bold" if name == comparison.main else "",
        )
    only = f"only in the first {comparison.only_in_first:,}, only in the second {comparison.only_in_second:,}"
    lines: list[RenderableType] = [Text(f"{comparison.questions:,} questions in both; {only}"), table]
    for change in comparison.settings:
        lines.append(Text(f"{change.name}: {change.first} → {change.second}", style="dim"))
    return Group(*lines)
