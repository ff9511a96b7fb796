"""SVG by hand: elements, marks, the axes of a chart.

Coordinates are pixels of a view box; in a string a float has one decimal, an integer none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072b2", "#d55e00", "#00875f", "#a2558c", "#22272e", "#8a9099"
"""Okabe and Ito's palette, green and purple darkened for thin lines on white."""
GRID = "#e6e8eb"
TARGET = "#dcebf5"
"""The band of a target."""
WIDTH, HEIGHT = 620, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 62, 14, 62
"""Margins around the plotting area."""

Ticks = Sequence[tuple[float, str]]
"""Where on an axis what is written."""


def markup(svg: str) -> Markup:
    """Mark a drawing as safe for a template."""
    return Markup(svg)  # noqa: S704 - drawn here, of numbers and escaped labels


def chart(body: Iterable[str], label: str, height: float = HEIGHT) -> Markup:
    """A whole drawing; a screen reader reads the `label` in its place."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return markup(f"{head}{''.join(body)}</svg>")


def standalone(drawing: Markup) -> str:
    """A drawing as a file of its own, with what a page's stylesheet gives it elsewhere."""
    style = "<style>text { font: 15px sans-serif; fill: #59616b } text.end { font-weight: 600 }</style>"
    head, _, body = str(drawing).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}<rect width="100%" height="100%" fill="#fff"/>{body}'


def element(name: str, **attributes: str | float) -> str:
    """An empty element with attributes in this order, whose values are not escaped; ``_`` stands for SVG's ``-``."""
    # One decimal is a tenth of a pixel: more would be bytes that nobody sees.
    parts = [f"<{name}"]
    for key, value in attributes.items():
        content = f"{value:.1f}" if isinstance(value, float) else value
        parts.append(f'{key.replace("_", "-")}="{content}"')
    return " ".join(parts) + "/>"


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Words at a place; `more` are further attributes, as SVG has them."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def path(points: Iterable[tuple[float, float]]) -> str:
    """A straight line from point to point, as the attribute `d` has it."""
    places = [f"{x:.1f} {y:.1f}" for x, y in points]
    return "M" + "L".join(places)


def line(points: Iterable[tuple[float, float]], colour: str, dash: str) -> str:
    """A thick line from point to point; `dash` is SVG's, empty for a solid one."""
    return element(
        "path",
        d=path(points),
        fill="none",
        stroke=colour,
        stroke_width="2.5",
        stroke_dasharray=dash,
        stroke_linejoin="round",
    )


def mark(name: str, x: float, y: float, colour: str, size: float = 4.5) -> str:
    """A marker's SVG: circle, square, diamond, triangle or none."""
    if name == "circle":
        return element(
            "circle",
            cx=float(x),
            cy=float(y),
            r=str(size),
            fill=colour,
        )
    corners = _corners(name, size)
    if not corners:
        return ""
    points = [f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners]
    return element("polygon", points=" ".join(points), fill=colour)


def _corners(name: str, size: float) -> Sequence[tuple[float, float]]:
    """Corners around the middle. The factors make marks of all shapes look equally large."""
    if name == "square":
        return (-size, -size), (size, -size), (size, size), (-size, size)
    if name == "diamond":
        reach = 1.35 * size
        return (0, -reach), (reach, 0), (0, reach), (-reach, 0)
    if name == "triangle":
        return (0, -1.3 * size), (1.2 * size, size), (-1.2 * size, size)
    return ()


@dataclass(frozen=True)
class Frame:
    """The plotting area: data coordinates to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        share = (value - low) / ((high - low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        share = (value - low) / ((high - low) or 1.0)
        # SVG's y grows downwards, a chart's upwards.
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def places(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        """Points (x, y) of the data, in pixels."""
        return [(self.x(x), self.y(y)) for x, y in points]


def axes(frame: Frame, x_ticks: Ticks, y_ticks: Ticks, x_title: str, y_title: str) -> list[str]:
    """Both axes with their titles, and a grid line at each tick of the vertical one."""
    body = []
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    # Grid lines before the axis: the axis is drawn over the one at its own height.
    for value, words in y_ticks:
        y = frame.y(value)
        body.append(
            element(
                "line",
                x1=LEFT,
                x2=right,
                y1=y,
                y2=y,
                stroke=GRID,
            )
        )
        body.append(text(LEFT - 8, y + 5, words, "end"))
    body.append(
        element(
            "line",
            x1=LEFT,
            x2=right,
            y1=bottom,
            y2=bottom,
            stroke=GREY,
        )
    )
    for value, words in x_ticks:
        x = frame.x(value)
        body.append(
            element(
                "line",
                x1=x,
                x2=x,
                y1=bottom,
                y2=bottom + 5,
                stroke=GREY,
            )
        )
        body.append(text(x, bottom + 22, words))
    body.append(
        text(
            (LEFT + right) / 2,
            HEIGHT - 8,
            x_title,
            more='class="axis"',
        )
    )
    middle = (TOP + bottom) / 2
    body.append(
        text(
            18,
            middle,
            y_title,
            more=f'class="axis" transform="rotate(-90 18 {middle:.1f})"',
        )
    )
    return body


def diagonal(frame: Frame) -> str:
    """The dotted line from (0, 0) to (1, 1)."""
    ends = path(frame.places([(0, 0), (1, 1)]))
    return element("path", d=ends, stroke=GREY, stroke_width="1.5", stroke_dasharray="2 4")
