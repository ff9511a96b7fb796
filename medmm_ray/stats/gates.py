"""Quality gates: a figure beside the target that it must meet. Targets in words are those of a report's reader."""

from dataclasses import dataclass
from typing import Literal

from medmm_ray.stats.grouped_stats import Figure

Unit = Literal["share", "kappa", "steps", "count", "dollars", "log_odds"]
Target = tuple[float | None, float | None]
"""Range of good values; an end is None where it is open."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A figure with its 95 % interval, and whether it meets its target.

    `passed` is None where there is no figure; `certain` says that the whole interval lies on the same side of the
    target as the figure; `strict` that a figure on an end of the target fails, as in "kappa above .8".
    """

    name: str
    title: str
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    target: Target
    strict: bool
    passed: bool | None
    certain: bool
    detail: str
    advice: str

    @property
    def side(self) -> int | None:
        """-1 where the figure lies below the target, 0 in it, 1 above it; None without a figure."""
        return _side(self.value, self.target, self.strict)


def make_gate(
    name: str,
    title: str,
    unit: Unit,
    figure: Figure | None,
    target: Target,
    *,
    strict: bool,
    detail: str = "",
) -> Gate:
    """The gate of a figure, without advice; `figure` is None where there is none."""
    value = low = high = None
    if figure is not None:
        value, low, high = figure.value, figure.low, figure.high
    side = _side(value, target, strict)
    low_side, high_side = _side(low, target, strict), _side(high, target, strict)
    return Gate(
        name=name,
        title=title,
        unit=unit,
        value=value,
        low=low,
        high=high,
        target=target,
        strict=strict,
        passed=None if side is None else side == 0,
        certain=low_side is not None and low_side == high_side,
        detail=detail,
        advice="",
    )


def _side(number: float | None, target: Target, strict: bool) -> int | None:
    if number is None:
        return None
    bottom, top = target
    if bottom is not None and (number <= bottom if strict else number < bottom):
        return -1
    if top is not None and (number >= top if strict else number > top):
        return 1
    return 0


def figure_text(value: float | None, unit: Unit) -> str:
    """A gate's figure in its unit."""
    if value is None:
        return "–"
    if unit == "share":
        text = f"{100 * value:.1f} %"
    elif unit == "kappa":
        text = f"{value:.3f}"
    elif unit == "steps":
        text = f"{value:.2f}"
    elif unit == "count":
        text = f"{value:,.0f}"
    elif unit == "dollars":
        text = f"${value:,.2f}"
    else:
        text = f"{value:.1e}"
    # A minus sign, as a hyphen reads like a range.
    return text.replace("-", "−")


def target_text(gate: Gate) -> str:
    """A gate's target in words: above, at least, below, at most, or a range."""
    low, high = gate.target
    unit = gate.unit
    if low is not None and high is not None:
        return f"{_limit_text(low, unit).removesuffix(' %')}–{_limit_text(high, unit)}"
    if low is not None:
        return f"{'>' if gate.strict else '≥'} {_limit_text(low, unit)}"
    if high is None:
        return "–"
    if high == 0:
        return "none"
    return f"{'<' if gate.strict else '≤'} {_limit_text(high, unit)}"


def _limit_text(limit: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * limit:g} %"
    return f"${limit:,.0f}" if unit == "dollars" else f"{limit:g}"
