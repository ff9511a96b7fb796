"""Charts as inline SVG: numbers in, markup out; colours that colour-blind readers tell apart, sizes left to CSS.

All text here is made of numbers and of labels written in this package; nothing from the data is drawn unescaped.
"""

from collections.abc import Iterable, Sequence
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


def _svg(body: Iterable[str], label: str) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
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
