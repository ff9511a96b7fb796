"""Charts as inline SVG: numbers in, markup out; colours that colour-blind readers tell apart, sizes left to CSS.

All text here is made of numbers and of labels written in this package; nothing from the data is drawn unescaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072b2", "#d55e00", "#00875f", "#a2558c", "#22272e", "#8a9099"
"""Okabe and Ito's palette, green and purple darkened for thin lines on white."""
GRID = "#e6e8eb"
WIDTH, HEIGHT = 620, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 62, 14, 62


@dataclass(frozen=True)
class Series:
    """One line: its points (x, value, low, high), x in units of the axis; `dash` as in SVG, `mark` a marker's name."""

    name: str
    colour: str
    mark: str
    dash: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class _Frame:
    """The plotting area: data coordinates to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def _svg(body: Iterable[str], label: str, height: float = HEIGHT) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return _markup(f"{head}{''.join(body)}</svg>")


def _markup(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 - drawn here, of numbers and escaped labels


def _text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def _axes(
    frame: _Frame,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
) -> list[str]:
    body = []
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, words in y_ticks:
        y = frame.y(value)
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        body.append(_text(left - 8, y + 5, words, "end"))
    body.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{GREY}"/>')
    for value, words in x_ticks:
        x = frame.x(value)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="{GREY}"/>')
        body.append(_text(x, bottom + 22, words))
    body.append(_text((left + right) / 2, HEIGHT - 8, x_title, more='class="axis"'))
    middle = (TOP + bottom) / 2
    body.append(_text(18, middle, y_title, more=f'class="axis" transform="rotate(-90 18 {middle:.1f})"'))
    return body


def _percent_ticks() -> list[tuple[float, str]]:
    return [(tick / 100, f"{tick} %") for tick in range(0, 101, 20)]


def _share_ticks() -> list[tuple[float, str]]:
    return [(tick / 5, f"{tick / 5:.1f}") for tick in range(6)]


def _diagonal(frame: _Frame) -> str:
    ends = _path([(frame.x(0), frame.y(0)), (frame.x(1), frame.y(1))])
    return f'<path d="{ends}" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="2 4"/>'


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def mark(name: str, x: float, y: float, colour: str, size: float = 4.5) -> str:
    """A marker's SVG: circle, square, diamond, triangle or none."""
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>'
    s = size
    corners = {
        "square": ((-s, -s), (s, -s), (s, s), (-s, s)),
        "diamond": ((0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)),
        "triangle": ((0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)),
    }.get(name, ())
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>' if corners else ""


def key(series: Series) -> Markup:
    """The legend's swatch of a series."""
    stroke = f'stroke="{series.colour}" stroke-width="2.5" stroke-dasharray="{series.dash}"'
    line = f'<line x1="1" x2="33" y1="9" y2="9" {stroke}/>{mark(series.mark, 17, 9, series.colour)}'
    return _markup(f'<svg class="key" viewBox="0 0 34 18" aria-hidden="true">{line}</svg>')


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions as near to the wanted ones as a gap between them allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = floor = max(wanted[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def lines_over_n(series: Sequence[Series], ns: Sequence[int], label: str) -> Markup:
    """Accuracy over N (x of a point: its place in `ns`), 95 % intervals as bands, last values written out."""
    frame = _Frame((0, max(len(ns) - 1, 1)), (0, 1))
    ticks = [(float(i), str(n)) for i, n in enumerate(ns)]
    body = _axes(frame, ticks, _percent_ticks(), "samples a question, N (log scale)", "questions answered rightly")
    for line in series:
        upper = [(frame.x(x), frame.y(high)) for x, _, _, high in line.points]
        lower = [(frame.x(x), frame.y(low)) for x, _, low, _ in reversed(line.points)]
        body.append(f'<path d="{_path(upper + lower)}Z" fill="{line.colour}" fill-opacity="0.11"/>')
    for line in series:
        at = [(frame.x(x), frame.y(value)) for x, value, _, _ in line.points]
        style = f'fill="none" stroke="{line.colour}" stroke-width="2.5" stroke-dasharray="{line.dash}"'
        body.append(f'<path d="{_path(at)}" {style} stroke-linejoin="round"/>')
        body += [mark(line.mark, x, y, line.colour) for x, y in at]
    ends = [line.points[-1] for line in series]
    places = _spread([frame.y(end[1]) + 5 for end in ends], 21, TOP + 6, HEIGHT - BOTTOM)
    for line, end, y in zip(series, ends, places, strict=True):
        body.append(_text(frame.x(end[0]) + 10, y, f"{100 * end[1]:.1f}", "start", f'fill="{line.colour}" class="end"'))
    return _svg(body, label)


def calibration(curves: Sequence[tuple[str, str, str, Sequence[dict[str, Any]]]], label: str) -> Markup:
    """Reliability: (name, colour, marker, bins) a curve; a marker's area grows with the bin's share of the steps."""
    frame = _Frame((0, 1), (0, 1))
    body = _axes(frame, _share_ticks(), _share_ticks(), "probability given to the step", "share of right steps")
    body.append(_diagonal(frame))
    for _, colour, shape, bins in curves:
        filled = [b for b in bins if b["count"]]
        total = sum(b["count"] for b in filled)
        if not total:
            continue
        at = [(frame.x(b["mean_probability"]), frame.y(b["share_right"])) for b in filled]
        body.append(f'<path d="{_path(at)}" fill="none" stroke="{colour}" stroke-width="2" stroke-opacity="0.55"/>')
        for (x, y), one in zip(at, filled, strict=True):
            body.append(mark(shape, x, y, colour, 3 + 9 * (one["count"] / total) ** 0.5))
    return _svg(body, label)


def roc(curves: Sequence[tuple[str, str, str, Sequence[float], Sequence[float]]], label: str) -> Markup:
    """(name, colour, dash, false positive rates, true positive rates) a curve."""
    frame = _Frame((0, 1), (0, 1))
    body = _axes(frame, _share_ticks(), _share_ticks(), "wrong steps called right", "right steps called right")
    body.append(_diagonal(frame))
    for _, colour, dash, false, true in curves:
        if false:
            at = [(frame.x(x), frame.y(y)) for x, y in zip(false, true, strict=True)]
            style = f'fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
            body.append(f'<path d="{_path(at)}" {style} stroke-linejoin="round"/>')
    return _svg(body, label)


def histogram(right: Sequence[int], wrong: Sequence[int], label: str) -> Markup:
    """Steps by probability: right ones upward in blue, wrong ones downward in orange, as shares of all steps."""
    total = sum(right) + sum(wrong) or 1
    top = max(max(right, default=0), max(wrong, default=0)) / total or 1.0
    frame = _Frame((0, 1), (-top * 1.08, top * 1.08))
    middle, width = frame.y(0), frame.x(1 / max(len(right), 1)) - frame.x(0)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if 3 * s > top or s == 0.5)
    ticks = [(i * step, f"{100 * abs(i) * step:.0f} %") for i in range(-3, 4) if abs(i) * step <= top * 1.08]
    body = _axes(frame, _share_ticks(), ticks, "probability given to the step", "share of steps")
    for counts, colour, sign in ((right, BLUE, 1), (wrong, ORANGE, -1)):
        for place, count in enumerate(counts):
            end = frame.y(sign * count / total)
            body.append(
                f'<rect x="{frame.x(place / len(counts)) + 1:.1f}" width="{width - 2:.1f}" y="{min(end, middle):.1f}" '
                f'height="{abs(end - middle):.1f}" fill="{colour}" fill-opacity="0.85"/>'
            )
    body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{INK}"/>')
    body.append(_text(LEFT + 10, TOP + 16, "right steps", "start", f'fill="{BLUE}" class="end"'))
    body.append(_text(WIDTH - RIGHT - 10, HEIGHT - BOTTOM - 12, "wrong steps", "end", f'fill="{ORANGE}" class="end"'))
    return _svg(body, label)


# Figures with intervals beside their targets


@dataclass(frozen=True)
class Whisker:
    """One row of a `forest`: a figure with its interval (None: not known) and a target band (an end None: open)."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    colour: str = BLUE
    mark: str = "circle"
    target: tuple[float | None, float | None] | None = None


ROW, FOREST_RIGHT = 34, 92
TARGET = "#dcebf5"


def forest(
    rows: Sequence[Whisker | str], x_range: tuple[float, float], share: bool, x_title: str, label: str
) -> Markup:
    """Figures as dots with their 95 % intervals, a row each, targets as pale bands; a plain text row is a heading."""
    height = TOP + ROW * len(rows) + 58
    bottom, right = height - 52, WIDTH - FOREST_RIGHT
    left = 16 + 9.8 * max(12, *(len(row.name) for row in rows if isinstance(row, Whisker)))  # names at a phone's size
    low_x, high_x = x_range

    def x(value: float) -> float:
        inside = min(max(value, low_x), high_x)
        return left + (inside - low_x) / (high_x - low_x) * (right - left)

    body = []
    for number, row in enumerate(rows):
        if isinstance(row, Whisker) and row.target is not None:
            start, end = x(row.target[0] if row.target[0] is not None else low_x), x(row.target[1] or high_x)
            top = TOP + ROW * number
            body.append(f'<rect x="{start:.1f}" width="{end - start:.1f}" y="{top}" height="{ROW}" fill="{TARGET}"/>')
    for tick in _ticks(low_x, high_x):
        words = f"{100 * tick:.0f} %" if share else f"{tick:.1f}".replace("-", "−")
        body.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom:.0f}" stroke="{GRID}"/>')
        body.append(_text(x(tick), bottom + 19, words))
    body.append(f'<line x1="{left:.1f}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{GREY}"/>')
    body.append(_text((left + right) / 2, height - 6, x_title, more='class="axis"'))
    for number, row in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        if isinstance(row, str):
            body.append(_text(0, y + 6, row, "start", f'fill="{INK}" class="end"'))
        else:
            body += _whisker(row, left, y, x, share)
    return _svg(body, label, height)


def _whisker(row: Whisker, left: float, y: float, x: Callable[[float], float], share: bool) -> list[str]:
    body = [_text(left - 12, y + 5, row.name, "end")]
    if row.value is None:
        return [*body, _text(WIDTH, y + 5, "–", "end")]
    if row.low is not None and row.high is not None:
        body.append(_span(x(row.low), x(row.high), y, row.colour))
    body.append(mark(row.mark, x(row.value), y, row.colour, 5.5))
    words = f"{100 * row.value:.1f} %" if share else f"{row.value:.3f}".replace("-", "−")
    return [*body, _text(WIDTH, y + 5, row.note or words, "end", f'fill="{INK}"')]


def _span(start: float, end: float, y: float, colour: str) -> str:
    return (
        f'<path d="M{start:.1f} {y:.1f}H{end:.1f}M{start:.1f} {y - 5:.1f}v10M{end:.1f} {y - 5:.1f}v10" '
        f'stroke="{colour}" stroke-width="2" fill="none"/>'
    )


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 6 or s == 50)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def gauge(row: Whisker, x_range: tuple[float, float]) -> Markup:
    """One figure on a bare scale, its target as a band: for a table's cell."""
    width, height = 220, 26

    def x(value: float) -> float:
        return 6 + (min(max(value, x_range[0]), x_range[1]) - x_range[0]) / (x_range[1] - x_range[0]) * (width - 12)

    target = row.target or (None, None)
    start, end = x(x_range[0] if target[0] is None else target[0]), x(x_range[1] if target[1] is None else target[1])
    body = [
        f'<rect x="6" width="{width - 12}" y="10" height="6" fill="#eceef0"/>',
        f'<rect x="{start:.1f}" width="{max(end - start, 2):.1f}" y="7" height="12" fill="#b5d5e9"/>',
    ]
    if row.low is not None and row.high is not None and row.high > row.low:
        body.append(_span(x(row.low), x(row.high), 13, row.colour))
    if row.value is not None:
        body.append(mark(row.mark, x(row.value), 13, row.colour, 5))
    return _markup(f'<svg class="gauge" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(body)}</svg>')


def bars(
    counts: Sequence[tuple[str, float, str]], band: tuple[float, float] | None, x_title: str, y_title: str, label: str
) -> Markup:
    """Bars of shares: (name, share, colour) in order; `band` shades a range of places, from the middle of bars."""
    top = max((share for _, share, _ in counts), default=0.0) or 1.0
    frame = _Frame((-0.5, max(len(counts), 1) - 0.5), (0, top * 1.08))
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if 6 * s > top or s == 0.5)
    every = max(1, math.ceil(len(counts) / 16))
    ticks = [(float(i), name) for i, (name, _, _) in enumerate(counts) if i % every == 0]
    y_ticks = [(i * step, f"{100 * i * step:.0f} %") for i in range(int(top * 1.08 / step) + 1)]
    body = []
    if band is not None:
        start, end = frame.x(max(band[0], -0.5)), frame.x(min(band[1], len(counts) - 0.5))
        body.append(
            f'<rect x="{start:.1f}" width="{max(end - start, 0):.1f}" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}" '
            f'fill="{TARGET}"/>'
        )
    body += _axes(frame, ticks, y_ticks, x_title, y_title)
    width = frame.x(1) - frame.x(0)
    for place, (_, share, colour) in enumerate(counts):
        y = frame.y(share)
        body.append(
            f'<rect x="{frame.x(place) - 0.4 * width:.1f}" width="{0.8 * width:.1f}" y="{y:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{colour}"/>'
        )
    return _svg(body, label)
