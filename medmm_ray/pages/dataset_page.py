"""dataset_report.json -> dataset_report.html (one self-contained page) and a few lines for the terminal.

Enters: the dict that `medmm_ray.steps.audit.audit` makes. Leaves: HTML with inline styles and SVG figures; it loads
nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.pages import charts
from medmm_ray.pages.charts import BLUE, GREEN, GREY, ORANGE, Whisker
from medmm_ray.pages.report import SOURCE_NAMES, count, fixed, pages, percent, words
from medmm_ray.steps.audit import figure_text, target_text

Row = dict[str, Any]
STATES = {True: ("✓", "met", BLUE), False: ("✗", "not met", ORANGE), None: ("?", "no figure", GREY)}
CHECKS = {
    "images_of_questions": "Pictures asked about in more than one split",
    "image_files": "Image files in more than one split",
    "questions": "Questions (text, options, pictures) in more than one split",
    "references_outside_training": "Questions with a reference case from outside training",
    "own_image_as_reference": "Questions with their own picture as a reference case",
}
SCALES = {"share": (0.0, 1.0), "kappa": (0.0, 1.0), "steps": (0.0, 20.0)}
GROUPINGS = {"answer": "By answer", "difficulty": "By difficulty", "modality": "By modality", "position": "By step"}


def render(report: Row) -> str:
    """The page."""
    env = pages()
    env.filters |= {"dollars": dollars}
    return env.get_template("dataset_page.html.j2").render(
        r=report,
        lead=lead(report),
        tiles=tiles(report),
        states=STATES,
        gauges={gate["name"]: _gauge(gate) for gate in report["gates"]},
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
    return SOURCE_NAMES.get(source, words(source))


def dollars(value: float) -> str:
    return f"${value:,.2f}"


def bar(share: float, kind: str = "plus") -> Markup:
    """A share as a bar in a table's cell."""
    return Markup(f'<div class="stack"><span class="{kind}" style="width:{100 * share:.2f}%"></span></div>')  # noqa: S704


def lead(report: Row) -> str:
    """How many gates are met, and which are not."""
    gates = report["gates"]
    met = sum(gate["passed"] is True for gate in gates)
    failed = [gate["title"].lower() for gate in gates if gate["passed"] is False]
    unknown = [gate["title"].lower() for gate in gates if gate["passed"] is None]
    parts = [f"The dataset meets {met} of {len(gates)} quality gates."]
    parts += [f"Not met: {'; '.join(failed)}."] if failed else []
    parts += [f"No figure yet: {'; '.join(unknown)}."] if unknown else []
    return " ".join(parts)


def tiles(report: Row) -> list[Row]:
    """The figures at the top: name, figure, and a small line under it."""
    sampling, steps, source = report["sampling"], report["steps"], report["source"]
    pair = next((p for p in report["agreement"] if (p["first"], p["second"]) == ("judge", "expert")), None)
    kappa = pair["kappa"]["all"]["all"] if pair else None
    spoke = next((b for b in report["balance"] if b["source"] == source), None)
    right = spoke["share"]["all"].get("all") if spoke else None
    accuracy = sampling["accuracy"]["all"].get("all")
    splits = ", ".join(f"{count(number)} {split}" for split, number in report["coverage"]["splits"].items())
    return [
        {"name": "Questions", "big": count(report["coverage"]["questions"]), "small": splits},
        {"name": "Solutions", "big": count(steps["solutions"]), "small": f"{count(sampling['missing'])} missing"},
        {"name": "Steps", "big": count(steps["steps"]), "small": f"{fixed(steps['mean']['value'], 2)} a solution"},
        {"name": "Right answers", "big": percent(accuracy and accuracy["value"]), "small": interval(accuracy)},
        {"name": f"Right steps, {source_name(source).lower() if source else 'no labels'}",
         "big": percent(right and right["value"]), "small": interval(right)},
        {"name": "κ of judge and expert", "big": fixed(kappa and kappa["value"], 2),
         "small": interval(kappa, share=False)},
    ]  # fmt: skip


def interval(figure: Row | None, share: bool = True) -> str:
    """The ends of a figure's interval, in percent or plain; empty where it has none."""
    if figure is None or figure["low"] is None:
        return ""
    scale, digits = (100, 1) if share else (1, 2)
    low, high = (round(scale * figure[end], digits) + 0.0 for end in ("low", "high"))  # + 0.0: no negative zero
    ends = [f"{end:.{digits}f}".replace("-", "−") for end in (low, high)]
    return f"{ends[0]} to {ends[1]}" if low < 0 else f"{ends[0]}–{ends[1]}"


# Figures


def _gauge(gate: Row) -> Markup:
    scale = SCALES.get(gate["unit"])
    if gate["unit"] == "dollars" and gate["target"][1]:
        scale = (0.0, 1.25 * gate["target"][1])
    if scale is None:
        return Markup("")
    colour, mark = STATES[gate["passed"]][2], "circle" if gate["passed"] else "diamond"
    row = Whisker("", gate["value"], gate["low"], gate["high"], colour=colour, mark=mark, target=gate["target"])
    return charts.gauge(row, scale)


def _calibration(report: Row) -> Markup | None:
    """Right answers and right steps by difficulty, beside the gates' ranges."""
    spoke = next((b for b in report["balance"] if b["source"] == report["source"]), None)
    if spoke is None:
        return None
    targets = {gate["name"]: gate["target"] for gate in report["gates"]}
    bands = {"easy": targets["easy_positive"], "hard": targets["hard_positive"], "all": targets["positive_share"]}
    steps = {**spoke["share"]["all"], **spoke["share"]["difficulty"]}
    answers = {**report["sampling"]["accuracy"]["all"], **report["sampling"]["accuracy"]["difficulty"]}
    rows: list[Whisker | str] = [f"Right steps ({source_name(spoke['source'])})"]
    rows += [_whisker(name, figure, BLUE, "circle", bands.get(name)) for name, figure in steps.items()]
    rows.append("Right answers")
    rows += [_whisker(name, figure, GREEN, "diamond", None) for name, figure in answers.items()]
    return charts.forest(rows, (0, 1), True, "share, with 95 % interval", "Right steps and answers by difficulty")


def _whisker(name: str, figure: Row, colour: str, mark: str, target: Sequence[float | None] | None) -> Whisker:
    band = None if target is None else (target[0], target[1])
    return Whisker(words(name), figure["value"], figure["low"], figure["high"], "", colour, mark, band)


def _histogram(report: Row) -> Markup | None:
    """Solutions by their number of steps; those below or above the usual numbers in orange."""
    counts = {int(number): count for number, count in report["steps"]["histogram"].items()}
    if not counts:
        return None
    few, many = report["config"]["usual_steps"]
    low, high = next(gate["target"] for gate in report["gates"] if gate["name"] == "mean_steps")
    first, last = min(1, *counts), min(max([*counts, round(high)]) + 1, 40)
    total = sum(counts.values())
    shown = [(str(n), counts.get(n, 0), n) for n in range(first, last)]
    over = sum(number for n, number in counts.items() if n >= last)
    shown.append((f"≥ {last}" if over else str(last), over, last))
    bars = [(name, number / total, ORANGE if n < few or n > many else BLUE) for name, number, n in shown]
    band = (low - first, high - first)
    return charts.bars(bars, band, "steps of a solution", "share of solutions", "Solutions by number of steps")


def _kappas(report: Row) -> Markup | None:
    """Kappa of every pair of sources."""
    rows: list[Whisker | str] = []
    limit = report["config"]["min_kappa"]
    for pair in report["agreement"]:
        name = f"{source_name(pair['first'])} – {_short(pair['second'])}"
        figure = pair["kappa"]["all"]["all"]
        aimed = (pair["first"], pair["second"]) == ("judge", "expert")
        rows.append(
            Whisker(name, figure["value"], figure["low"], figure["high"], target=(limit, None) if aimed else None)
        )
    return charts.forest(rows, _reach(rows), False, "Cohen's κ", "Agreement of label sources") if rows else None


def _details(report: Row) -> list[tuple[str, Markup]]:
    """For each pair kappa by group: the judge against expert and truth first, then the others."""
    found = []
    truth = ("expert", "phantom")
    for pair in sorted(report["agreement"], key=lambda p: (p["first"] != "judge", p["second"] not in truth)):
        rows: list[Whisker | str] = []
        for grouping, title in GROUPINGS.items():
            table = pair["kappa"][grouping]
            if len(table) > 1:
                rows.append(title)
                rows += [Whisker(words(name), f["value"], f["low"], f["high"]) for name, f in table.items()]
        if rows:
            name = f"{source_name(pair['first'])} – {source_name(pair['second'])}"
            found.append((name, charts.forest(rows, _reach(rows), False, "Cohen's κ", f"Agreement, {name}, by group")))
    return found


def _short(source: str) -> str:
    return source_name(source).partition(" (")[0]


def _reach(rows: Sequence[Whisker | str]) -> tuple[float, float]:
    """From 0, or from the tenth below the lowest interval, to 1."""
    lows = [row.low for row in rows if isinstance(row, Whisker) and row.low is not None]
    return math.floor(10 * min([0.0, *lows])) / 10, 1.0


# The terminal


def summary(report: Row) -> RenderableType:
    """The gates, a line each, and what to do about those that are not met."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("quality gate")
    table.add_column("found", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("wanted", justify="right")
    styles = {True: "green", False: "bold red", None: "yellow"}
    for gate in report["gates"]:
        known = gate["low"] is not None and gate["unit"] in SCALES
        ends = f"{figure_text(gate['low'], gate['unit'])} – {figure_text(gate['high'], gate['unit'])}" if known else ""
        table.add_row(
            Text(STATES[gate["passed"]][0], styles[gate["passed"]]), gate["title"],
            Text(figure_text(gate["value"], gate["unit"]), styles[gate["passed"]]), ends, target_text(gate),
        )  # fmt: skip
    sizes = f"{count(report['coverage']['questions'])} questions, {count(report['steps']['solutions'])} solutions, " \
            f"{count(report['steps']['steps'])} steps"  # fmt: skip
    lines: list[RenderableType] = [Text(sizes), table]
    if report["missing"]:
        lines.append(Text(f"not there yet: {', '.join(report['missing'])}", style="yellow"))
    lines += [Text(f"{g['title']}: {g['advice']}", style="dim") for g in report["gates"] if g["advice"]]
    return Group(*lines)
