"""An `AuditReport` -> dataset_report.html (one self-contained page) and a few lines for the terminal.

Leaves: HTML with inline styles and SVG figures; it loads nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.pages import charts
from medmm_ray.pages.charts import Bar
from medmm_ray.pages.forest import Whisker, forest, gauge
from medmm_ray.pages.report import SOURCE_NAMES, count, fixed, pages, percent, words
from medmm_ray.pages.svg import BLUE, GREEN, GREY, ORANGE
from medmm_ray.stats.agreement import KappaFigure, PairAgreement
from medmm_ray.stats.gates import Gate, Target, figure_text, target_text
from medmm_ray.stats.grouped_stats import Figure, GroupedStats, GroupFigure
from medmm_ray.steps.audit.report import AuditReport

STATES = {
    True: ("✓", "met", BLUE),
    False: ("✗", "not met", ORANGE),
    None: ("?", "no figure", GREY),
}
CHECKS = {
    "images_of_questions": "Pictures asked about in more than one split",
    "image_files": "Image files in more than one split",
    "questions": "Questions (text, options, pictures) in more than one split",
    "references_outside_training": "Questions with a reference case from outside training",
    "own_image_as_reference": "Questions with their own picture as a reference case",
}
SCALES = {
    "share": (0.0, 1.0),
    "kappa": (0.0, 1.0),
    "steps": (0.0, 20.0),
}
GROUPINGS = {
    "answer": "By answer",
    "difficulty": "By difficulty",
    "modality": "By modality",
    "position": "By step",
}


def render(report: AuditReport) -> str:
    """The page."""
    env = pages()
    env.filters |= {"dollars": dollars}
    return env.get_template("dataset_page.html.j2").render(
        r=report,
        lead=lead(report),
        tiles=tiles(report),
        states=STATES,
        gauges={gate.name: _gauge(gate) for gate in report.gates},
        spoken=figure_text,
        wanted=target_text,
        source_name=source_name,
        checks=CHECKS,
        calibration=_calibration(report),
        histogram=_histogram(report),
        kappas=_kappas(report),
        details=_details(report),
        bar=bar,
        interval=interval,
    )


def source_name(source: str) -> str:
    """A label source as the page calls it."""
    return SOURCE_NAMES.get(source, words(source))


def dollars(value: float) -> str:
    """A sum of money."""
    return f"${value:,.2f}"


def bar(share: float, kind: str = "plus") -> Markup:
    """A share as a bar in a table's cell."""
    return Markup(f'<div class="stack"><span class="{kind}" style="width:{100 * share:.2f}%"></span></div>')  # noqa: S704


def lead(report: AuditReport) -> str:
    """How many gates are met, and which are not."""
    titles: dict[bool | None, list[str]] = {True: [], False: [], None: []}  # by whether the gate is met
    for gate in report.gates:
        titles[gate.passed].append(gate.title.lower())
    sentences = [f"The dataset meets {len(titles[True])} of {len(report.gates)} quality gates."]
    if titles[False]:
        sentences.append(f"Not met: {'; '.join(titles[False])}.")
    if titles[None]:
        sentences.append(f"No figure yet: {'; '.join(titles[None])}.")
    return " ".join(sentences)


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page, with a small line under it."""

    name: str
    big: str
    small: str


def tiles(report: AuditReport) -> list[Tile]:
    """The figures at the top."""
    coverage = report.coverage
    sampling = report.sampling
    steps = report.steps
    splits = [f"{count(number)} {split}" for split, number in coverage.splits.items()]
    accuracy = sampling.accuracy["all"].get("all")
    balance = report.speaking_balance
    right_steps = balance.overall_share if balance else None
    kappa = report.judge_expert.overall_kappa if report.judge_expert else None
    labelled_by = source_name(report.source).lower() if report.source else "no labels"
    steps_a_solution = fixed(steps.mean.value, 2)
    return [
        Tile("Questions", count(coverage.questions), ", ".join(splits)),
        Tile("Solutions", count(steps.solutions), f"{count(sampling.missing)} missing"),
        Tile("Steps", count(steps.steps), f"{steps_a_solution} a solution"),
        Tile("Right answers", percent(_value(accuracy)), _interval_of(accuracy)),
        Tile(f"Right steps, {labelled_by}", percent(_value(right_steps)), _interval_of(right_steps)),
        Tile("κ of judge and expert", fixed(_value(kappa), 2), _interval_of(kappa, share=False)),
    ]


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None


def _interval_of(figure: Figure | None, share: bool = True) -> str:
    return interval(figure.low, figure.high, share) if figure else ""


def interval(low: float | None, high: float | None, share: bool = True) -> str:
    """The ends of an interval, in percent or plain; empty where there is none."""
    if low is None or high is None:
        return ""
    scale, digits = (100, 1) if share else (1, 2)
    low = round(scale * low, digits) + 0.0  # + 0.0: no negative zero
    high = round(scale * high, digits) + 0.0
    between = " to " if low < 0 else "–"  # a dash beside a minus reads badly
    return f"{low:.{digits}f}{between}{high:.{digits}f}".replace("-", "−")


# Figures


def _gauge(gate: Gate) -> Markup:
    """The gate's figure on a scale; nothing where its unit has none."""
    scale = SCALES.get(gate.unit)
    # Money has no natural end: the scale reaches a quarter beyond the budget.
    if gate.unit == "dollars" and gate.target[1]:
        scale = (0.0, 1.25 * gate.target[1])
    if scale is None:
        return Markup("")
    _, _, colour = STATES[gate.passed]
    shape = "circle" if gate.passed else "diamond"
    row = Whisker(
        "",
        gate.value,
        gate.low,
        gate.high,
        colour=colour,
        mark=shape,
        target=gate.target,
    )
    return gauge(row, scale)


def _calibration(report: AuditReport) -> Markup | None:
    """Right answers and right steps by difficulty, beside the gates' ranges."""
    balance = report.speaking_balance
    if balance is None:
        return None
    targets = {gate.name: gate.target for gate in report.gates}
    bands = {
        "easy": targets["easy_positive"],
        "hard": targets["hard_positive"],
        "all": targets["positive_share"],
    }
    # Only the shares of right steps have gates; the policy's accuracy is shown to compare.
    rows: list[Whisker | str] = [f"Right steps ({source_name(balance.source)})"]
    for name, figure in _by_difficulty(balance.share).items():
        rows.append(_whisker(name, figure, BLUE, "circle", bands.get(name)))
    rows.append("Right answers")
    for name, figure in _by_difficulty(report.sampling.accuracy).items():
        rows.append(_whisker(name, figure, GREEN, "diamond"))
    return forest(rows, (0, 1), True, "share, with 95 % interval", "Right steps and answers by difficulty")


def _by_difficulty(tables: GroupedStats) -> dict[str, GroupFigure]:
    """The figure of all, then those of each difficulty."""
    return {**tables["all"], **tables["difficulty"]}


def _whisker(
    name: str,
    figure: Figure,
    colour: str = BLUE,
    mark: str = "circle",
    target: Target | None = None,
) -> Whisker:
    return Whisker(words(name), figure.value, figure.low, figure.high, "", colour, mark, target)


def _histogram(report: AuditReport) -> Markup | None:
    """Solutions by their number of steps; those below or above the usual numbers in orange."""
    counts = {int(num_steps): number for num_steps, number in report.steps.histogram.items()}
    if not counts:
        return None
    low, high = report.config["mean_steps"]
    first = min(1, *counts)
    last = min(max([*counts, round(high)]) + 1, 40)  # all longer ones are one bar
    num_longer = sum(number for num_steps, number in counts.items() if num_steps >= last)
    total = sum(counts.values())
    few, many = report.config["usual_steps"]
    bars = []
    for num_steps in range(first, last + 1):
        name = str(num_steps)
        number = counts.get(num_steps, 0)
        if num_steps == last:
            name = f"≥ {last}" if num_longer else name
            number = num_longer
        is_usual = few <= num_steps <= many
        bars.append(
            Bar(
                name,
                number / total,
                BLUE if is_usual else ORANGE,
            )
        )
    band = (low - first, high - first)  # bars stand at places from 0
    return charts.bars(bars, band, "steps of a solution", "share of solutions", "Solutions by number of steps")


def _kappas(report: AuditReport) -> Markup | None:
    """Kappa of every pair of sources."""
    rows: list[Whisker | str] = []
    for pair in report.agreement:
        name = f"{source_name(pair.first)} – {_short(pair.second)}"
        figure = pair.overall_kappa
        target = (report.config["min_kappa"], None) if pair is report.judge_expert else None
        rows.append(Whisker(name, figure.value, figure.low, figure.high, target=target))
    if not rows:
        return None
    return forest(rows, _reach(rows), False, "Cohen's κ", "Agreement of label sources")


def _details(report: AuditReport) -> list[tuple[str, Markup]]:
    """For each pair kappa by group: the judge against expert and truth first, then the others."""
    details = []
    for pair in sorted(report.agreement, key=_rank):  # the page shows the first one beside the table
        rows = _rows_by_group(pair.kappa)
        if rows:
            name = f"{source_name(pair.first)} – {source_name(pair.second)}"
            chart = forest(
                rows,
                _reach(rows),
                False,
                "Cohen's κ",
                f"Agreement, {name}, by group",
            )
            details.append((name, chart))
    return details


def _rank(pair: PairAgreement) -> tuple[bool, bool]:
    # False sorts first: the judge, and of its pairs those with somebody who knows better.
    return pair.first != "judge", pair.second not in ("expert", "phantom")


def _rows_by_group(tables: Mapping[str, Mapping[str, KappaFigure]]) -> list[Whisker | str]:
    """A heading and a row a group, for each grouping that has several."""
    rows: list[Whisker | str] = []
    # A grouping of one group would say the same as all steps together.
    for grouping, title in GROUPINGS.items():
        table = tables[grouping]
        if len(table) > 1:
            rows.append(title)
            for name, figure in table.items():
                rows.append(_whisker(name, figure))
    return rows


def _short(source: str) -> str:
    """A source's name without what stands in brackets."""
    return source_name(source).partition(" (")[0]


def _reach(rows: Sequence[Whisker | str]) -> tuple[float, float]:
    """From 0, or from the tenth below the lowest interval, to 1."""
    lowest = 0.0
    for row in rows:
        if isinstance(row, Whisker) and row.low is not None:
            lowest = min(lowest, row.low)
    return math.floor(10 * lowest) / 10, 1.0


# The terminal


def summary(report: AuditReport) -> RenderableType:
    """The gates, a line each, and what to do about those that are not met."""
    questions = count(report.coverage.questions)
    steps = report.steps
    sizes = f"{questions} questions, {count(steps.solutions)} solutions, {count(steps.steps)} steps"
    lines: list[RenderableType] = [Text(sizes), _gates_table(report.gates)]
    if report.missing:
        lines.append(Text(f"not there yet: {', '.join(report.missing)}", style="yellow"))
    for gate in report.gates:
        if gate.advice:
            lines.append(Text(f"{gate.title}: {gate.advice}", style="dim"))
    return Group(*lines)


def _gates_table(gates: Sequence[Gate]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("quality gate")
    table.add_column("found", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("wanted", justify="right")
    styles = {True: "green", False: "bold red", None: "yellow"}
    for gate in gates:
        style = styles[gate.passed]
        sign, _, _ = STATES[gate.passed]
        ends = ""
        if gate.low is not None and gate.unit in SCALES:
            ends = f"{figure_text(gate.low, gate.unit)} – {figure_text(gate.high, gate.unit)}"
        table.add_row(
            Text(sign, style),
            gate.title,
            Text(figure_text(gate.value, gate.unit), style),
            ends,
            target_text(gate),
        )
    return table
