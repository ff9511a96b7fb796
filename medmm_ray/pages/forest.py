"""Figures with intervals beside their targets: a forest of many, or a gauge of one, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from medmm_ray.pages.svg import BLUE, GREY, GRID, INK, TARGET, TOP, WIDTH, chart, element, mark, markup, text

ROW_HEIGHT = 34
VALUES_WIDTH = 92  # of the column of values, on the right
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
"""Distances between ticks."""


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


@dataclass(frozen=True)
class _Scale:
    """A horizontal axis: values to pixels; what lies outside is drawn at its end."""

    low: float
    high: float
    start: float
    end: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        # An interval may reach beyond the scale; the drawing may not.
        inside = min(max(value, self.low), self.high)
        share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most seven round values."""
        length = self.high - self.low
        step = next(
            (step for step in STEPS if length / step <= 6),
            STEPS[-1],
        )
        # The small number: an end that is itself a tick must not fall out by rounding.
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # Multiples of a whole number, rounded: a sum of steps would drift to 0.30000000000000004.
        return [round(step * i, 10) for i in range(first, last + 1)]


def forest(
    rows: Sequence[Whisker | str],
    x_range: tuple[float, float],
    share: bool,
    x_title: str,
    label: str,
) -> Markup:
    """Figures as dots with their 95 % intervals, a row each, targets as pale bands; a plain text row is a heading."""
    height = TOP + ROW_HEIGHT * len(rows) + 58
    bottom = height - 52
    right = WIDTH - VALUES_WIDTH
    scale = _Scale(*x_range, start=_names_width(rows), end=right)
    # Bands first, for the grid lines to be seen on them.
    body = _bands(rows, scale)
    for tick in scale.ticks():
        words = _percent(tick, 0) if share else _plain(tick, 1)
        x = scale.x(tick)
        body.append(
            element(
                "line",
                x1=x,
                x2=x,
                y1=TOP,
                y2=bottom,
                stroke=GRID,
            )
        )
        body.append(text(x, bottom + 19, words))
    body.append(
        element(
            "line",
            x1=scale.start,
            x2=right,
            y1=bottom,
            y2=bottom,
            stroke=GREY,
        )
    )
    body.append(
        text(
            (scale.start + right) / 2,
            height - 6,
            x_title,
            more='class="axis"',
        )
    )
    for number, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * (number + 0.5)
        if isinstance(row, str):
            body.append(
                text(
                    0,
                    y + 6,
                    row,
                    "start",
                    f'fill="{INK}" class="end"',
                )
            )
        else:
            body += _row(row, y, scale, share)
    return chart(body, label, height)


def _names_width(rows: Sequence[Whisker | str]) -> float:
    """The room for the longest name, in letters of the size that a phone's style gives them."""
    lengths = [len(row.name) for row in rows if isinstance(row, Whisker)]
    return 16 + 10.8 * max([12, *lengths])


def _bands(rows: Sequence[Whisker | str], scale: _Scale) -> list[str]:
    body = []
    for number, row in enumerate(rows):
        if isinstance(row, Whisker) and row.target is not None:
            low, high = row.target
            start = scale.x(scale.low if low is None else low)
            end = scale.x(high or scale.high)
            top = TOP + ROW_HEIGHT * number
            body.append(
                element(
                    "rect",
                    x=start,
                    width=end - start,
                    y=top,
                    height=ROW_HEIGHT,
                    fill=TARGET,
                )
            )
    return body


def _row(row: Whisker, y: float, scale: _Scale, share: bool) -> list[str]:
    body = [text(scale.start - 12, y + 5, row.name, "end")]
    if row.value is None:
        return [*body, text(WIDTH, y + 5, "–", "end")]
    if row.low is not None and row.high is not None:
        body.append(
            _interval(
                scale.x(row.low),
                scale.x(row.high),
                y,
                row.colour,
            )
        )
    body.append(
        mark(
            row.mark,
            scale.x(row.value),
            y,
            row.colour,
            5.5,
        )
    )
    words = _percent(row.value, 1) if share else _plain(row.value, 3)
    return [*body, text(WIDTH, y + 5, row.note or words, "end", f'fill="{INK}"')]


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f} %"


def _plain(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _interval(start: float, end: float, y: float, colour: str) -> str:
    """A line with a stroke across each end."""
    strokes = f"M{start:.1f} {y:.1f}H{end:.1f}M{start:.1f} {y - 5:.1f}v10M{end:.1f} {y - 5:.1f}v10"
    return element("path", d=strokes, stroke=colour, stroke_width="2", fill="none")


def gauge(row: Whisker, x_range: tuple[float, float]) -> Markup:
    """One figure on a bare scale, its target as a band: for a table's cell."""
    width, height = 220, 26
    scale = _Scale(*x_range, start=6, end=width - 6)
    low, high = row.target or (None, None)
    start = scale.x(scale.low if low is None else low)
    end = scale.x(scale.high if high is None else high)
    body = [
        element("rect", x=6, width=width - 12, y=10, height=6, fill="#eceef0"),
        element("rect", x=float(start), width=max(end - start, 2.0), y=7, height=12, fill="#b5d5e9"),
    ]
    # An interval of no width, as of a sum of money, is no interval.
    if row.low is not None and row.high is not None and row.high > row.low:
        body.append(
            _interval(
                scale.x(row.low),
                scale.x(row.high),
                13,
                row.colour,
            )
        )
    if row.value is not None:
        body.append(
            mark(
                row.mark,
                scale.x(row.value),
                13,
                row.colour,
                5,
            )
        )
    return markup(f'<svg class="gauge" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(body)}</svg>')
