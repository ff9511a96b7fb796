"""Charts as inline SVG: numbers in, markup out; colours that colour-blind readers tell apart, sizes left to CSS.

No library draws: a page must hold its charts itself, in text that a browser and a printer scale and a stylesheet
formats, and a plotting library would bring megabytes of script, or pictures with their own fonts. All text here is made
of numbers and of labels written in this package; nothing from the data is drawn unescaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from medmm_ray.pages.svg import (
    BLUE,
    BOTTOM,
    HEIGHT,
    INK,
    LEFT,
    ORANGE,
    RIGHT,
    TARGET,
    TOP,
    WIDTH,
    Frame,
    axes,
    chart,
    diagonal,
    element,
    line,
    mark,
    markup,
    path,
    text,
)

SHARE_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Distances between the ticks of an axis of shares."""


class Point(NamedTuple):
    """A value at x, and the ends of its interval."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line of a chart: x of its points in units of the axis; `dash` as in SVG, `mark` a marker's name."""

    name: str
    colour: str
    mark: str
    dash: str
    points: Sequence[Point]


class Bin(NamedTuple):
    """Steps of similar probability: their mean probability, the share of right ones, how many they are."""

    probability: float
    share_right: float
    num_steps: int


@dataclass(frozen=True)
class CalibrationCurve:
    """The bins of one scorer that hold any step."""

    colour: str
    mark: str
    bins: Sequence[Bin]


@dataclass(frozen=True)
class RocCurve:
    """One scorer's rates over all thresholds; none where they are not defined."""

    colour: str
    dash: str
    false_positive_rates: Sequence[float]
    true_positive_rates: Sequence[float]


class Bar(NamedTuple):
    """One bar of a chart of shares."""

    name: str
    share: float
    colour: str


def key(series: Series) -> Markup:
    """The legend's swatch of a series."""
    stroke = element(
        "line", x1=1, x2=33, y1=9, y2=9, stroke=series.colour, stroke_width="2.5", stroke_dasharray=series.dash
    )
    swatch = stroke + mark(series.mark, 17, 9, series.colour)
    return markup(f'<svg class="key" viewBox="0 0 34 18" aria-hidden="true">{swatch}</svg>')


# Ticks and labels


PERCENT_TICKS = ((0.0, "0 %"), (0.2, "20 %"), (0.4, "40 %"), (0.6, "60 %"), (0.8, "80 %"), (1.0, "100 %"))
SHARE_TICKS = ((0.0, "0.0"), (0.2, "0.2"), (0.4, "0.4"), (0.6, "0.6"), (0.8, "0.8"), (1.0, "1.0"))


def _share_step(top: float, max_ticks: int) -> float:
    """The smallest distance with which `max_ticks` ticks reach beyond `top`."""
    for step in SHARE_STEPS:
        if max_ticks * step > top:
            return step
    return SHARE_STEPS[-1]


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions as near to the given ones as a gap between them allows."""
    order = sorted(
        range(len(positions)),
        key=lambda i: positions[i],
    )
    placed = [0.0] * len(positions)
    floor = low
    # From the top down each makes room below the one before it; then from the bottom up, so that the last ones fit.
    for i in order:
        placed[i] = max(positions[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


# Charts


def lines_over_n(series: Sequence[Series], ns: Sequence[int], label: str) -> Markup:
    """Accuracy over N (x of a point: its place in `ns`), 95 % intervals as bands, last values written out."""
    frame = Frame((0, max(len(ns) - 1, 1)), (0, 1))
    ticks = [(float(i), str(n)) for i, n in enumerate(ns)]
    body = axes(frame, ticks, PERCENT_TICKS, "samples a question, N (log scale)", "questions answered rightly")
    # All bands first: a band would dim the lines of the series before it.
    for curve in series:
        body.append(_band(frame, curve))
    for curve in series:
        places = frame.places([(point.x, point.value) for point in curve.points])
        body.append(line(places, curve.colour, curve.dash))
        body += [mark(curve.mark, x, y, curve.colour) for x, y in places]
    body += _end_values(frame, series)
    return chart(body, label)


def _band(frame: Frame, curve: Series) -> str:
    """The intervals of a series as an area: along the upper ends, back along the lower ones."""
    outline = [(point.x, point.high) for point in curve.points]
    outline += [(point.x, point.low) for point in reversed(curve.points)]
    return element(
        "path",
        d=path(frame.places(outline)) + "Z",
        fill=curve.colour,
        fill_opacity="0.11",
    )


def _end_values(frame: Frame, series: Sequence[Series]) -> list[str]:
    """The last value of each series, in percent, written beside its line."""
    # Lines that end close together would write their values into each other.
    ends = [curve.points[-1] for curve in series]
    heights = [frame.y(end.value) + 5 for end in ends]
    body = []
    for curve, end, y in zip(series, ends, _spread(heights, 21, TOP + 6, HEIGHT - BOTTOM), strict=True):
        value = f"{100 * end.value:.1f}"
        body.append(
            text(
                frame.x(end.x) + 10,
                y,
                value,
                "start",
                f'fill="{curve.colour}" class="end"',
            )
        )
    return body


def calibration(curves: Sequence[CalibrationCurve], label: str) -> Markup:
    """Reliability of probabilities; a marker's area grows with the bin's share of the steps."""
    frame = Frame((0, 1), (0, 1))
    body = axes(frame, SHARE_TICKS, SHARE_TICKS, "probability given to the step", "share of right steps")
    body.append(diagonal(frame))
    for curve in curves:
        if not curve.bins:
            continue
        total = sum(bin_.num_steps for bin_ in curve.bins)
        places = frame.places([(bin_.probability, bin_.share_right) for bin_ in curve.bins])
        body.append(
            element("path", d=path(places), fill="none", stroke=curve.colour, stroke_width="2", stroke_opacity="0.55")
        )
        for (x, y), bin_ in zip(places, curve.bins, strict=True):
            # The root: what the eye compares is the area, not the radius.
            size = 3 + 9 * (bin_.num_steps / total) ** 0.5
            body.append(
                mark(
                    curve.mark,
                    x,
                    y,
                    curve.colour,
                    size,
                )
            )
    return chart(body, label)


def roc(curves: Sequence[RocCurve], label: str) -> Markup:
    """Right steps called right over wrong steps called right."""
    frame = Frame((0, 1), (0, 1))
    body = axes(frame, SHARE_TICKS, SHARE_TICKS, "wrong steps called right", "right steps called right")
    body.append(diagonal(frame))
    for curve in curves:
        if curve.false_positive_rates:
            points = zip(curve.false_positive_rates, curve.true_positive_rates, strict=True)
            body.append(
                line(
                    frame.places(points),
                    curve.colour,
                    curve.dash,
                )
            )
    return chart(body, label)


def histogram(right: Sequence[int], wrong: Sequence[int], label: str) -> Markup:
    """Steps by probability: right ones upward in blue, wrong ones downward in orange, as shares of all steps."""
    total = sum(right) + sum(wrong) or 1
    top = max([*right, *wrong, 0]) / total or 1.0  # of no step at all, an empty chart
    limit = top * 1.08  # air above the highest column
    frame = Frame((0, 1), (-limit, limit))
    body = axes(
        frame,
        SHARE_TICKS,
        _mirrored_ticks(top, limit),
        "probability given to the step",
        "share of steps",
    )
    body += _columns(
        frame,
        [count / total for count in right],
        BLUE,
    )
    body += _columns(
        frame,
        [-count / total for count in wrong],
        ORANGE,
    )
    middle = frame.y(0)
    body.append(
        element(
            "line",
            x1=LEFT,
            x2=WIDTH - RIGHT,
            y1=middle,
            y2=middle,
            stroke=INK,
        )
    )
    body.append(
        text(
            LEFT + 10,
            TOP + 16,
            "right steps",
            "start",
            f'fill="{BLUE}" class="end"',
        )
    )
    body.append(
        text(
            WIDTH - RIGHT - 10,
            HEIGHT - BOTTOM - 12,
            "wrong steps",
            "end",
            f'fill="{ORANGE}" class="end"',
        )
    )
    return chart(body, label)


def _mirrored_ticks(top: float, limit: float) -> list[tuple[float, str]]:
    """Ticks of shares up and down from 0, at most three each way."""
    step = _share_step(top, 3)
    ticks = []
    for i in range(-3, 4):
        distance = abs(i) * step
        if distance <= limit:
            words = f"{100 * abs(i) * step:.0f} %"
            ticks.append((i * step, words))
    return ticks


def _columns(frame: Frame, shares: Sequence[float], colour: str) -> list[str]:
    """Columns of equal width from the middle line, negative shares downward."""
    middle = frame.y(0)
    width = frame.x(1 / max(len(shares), 1)) - frame.x(0)
    body = []
    for place, share in enumerate(shares):
        end = frame.y(share)
        # A pixel of air on either side keeps neighbours apart.
        body.append(
            element(
                "rect",
                x=frame.x(place / len(shares)) + 1,
                width=width - 2,
                y=min(end, middle),
                height=abs(end - middle),
                fill=colour,
                fill_opacity="0.85",
            )
        )
    return body


def bars(
    columns: Sequence[Bar],
    band: tuple[float, float] | None,
    x_title: str,
    y_title: str,
    label: str,
) -> Markup:
    """Bars of shares, in order; `band` shades a range of places, from the middle of bars."""
    shares = [bar.share for bar in columns]
    top = max(shares, default=0.0) or 1.0
    limit = top * 1.08  # air above the highest bar
    # Bars stand at 0, 1, 2, …: half a place of room at either end.
    frame = Frame(
        (-0.5, max(len(columns), 1) - 0.5),
        (0, limit),
    )
    step = _share_step(top, 6)
    y_ticks = []
    for i in range(int(limit / step) + 1):
        percent = f"{100 * i * step:.0f} %"
        y_ticks.append((i * step, percent))
    every = max(1, math.ceil(len(columns) / 16))  # more names would run into each other
    x_ticks = []
    for i in range(0, len(columns), every):
        x_ticks.append((float(i), columns[i].name))
    body = []
    # The band first, for grid lines and bars to be seen on it.
    if band is not None:
        start = frame.x(max(band[0], -0.5))
        end = frame.x(min(band[1], len(columns) - 0.5))
        width = max(end - start, 0.0)
        body.append(
            element(
                "rect",
                x=start,
                width=width,
                y=TOP,
                height=HEIGHT - TOP - BOTTOM,
                fill=TARGET,
            )
        )
    body += axes(frame, x_ticks, y_ticks, x_title, y_title)
    room = frame.x(1) - frame.x(0)
    for place, bar in enumerate(columns):
        start = frame.x(place) - 0.4 * room
        y = frame.y(bar.share)
        body.append(
            element(
                "rect",
                x=start,
                width=0.8 * room,
                y=y,
                height=HEIGHT - BOTTOM - y,
                fill=bar.colour,
            )
        )
    return chart(body, label)
