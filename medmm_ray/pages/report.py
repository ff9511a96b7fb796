"""report.json -> report.html (one self-contained page) and the few lines that end a run on the terminal.

Enters: the dict that `medmm_ray.steps.evaluate.evaluate` makes, and a function that opens an image's uri. Leaves: HTML
with inline styles, SVG figures and pictures; it loads nothing from anywhere. Everything from the data is escaped.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.data.tables import RowError
from medmm_ray.pages import charts
from medmm_ray.pages.charts import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Series
from medmm_ray.steps.evaluate.steps import TRUTHS

if TYPE_CHECKING:
    from PIL.Image import Image

Row = dict[str, Any]
ARM_NAMES = {"text_only": "Text only", "multimodal": "Multimodal", "shuffled_image": "Shuffled image"}
ARM_STYLES = {
    "text_only": (ORANGE, "square", ""),
    "multimodal": (BLUE, "circle", ""),
    "shuffled_image": (PURPLE, "triangle", "7 3"),
}
SOURCE_NAMES = {
    "judge": "Judge",
    "monte_carlo": "Monte Carlo",
    "tree_search": "Tree search",
    "expert": "Expert",
    "phantom": "Phantom (truth)",
}
GATE_NAMES = {
    "judge_expert_kappa": "Judge agrees with the expert (κ)",
    "model_reference_kappa": "Model agrees with truth or expert, step by step (κ)",
    "ece": "Expected calibration error, multimodal",
    "multimodal_gain": "Gain of the image at best-of-N (fraction)",
    "text_unchanged_without_image": "Text part against text-only scores (largest difference)",
}
ROLE_NAMES = {
    "chosen_multimodal": "chosen by the multimodal scorer",
    "chosen_text_only": "chosen by the text-only scorer",
    "best_wrong": "best-scored wrong answer",
    "best_right": "best-scored right answer",
}
KIND_NAMES = {
    "rescued": "The image rescued it",
    "missed": "Missed: a right answer was there",
    "agreed": "Both scorers right",
}
SMALLEST_SIDE, LARGEST_SIDE = 360, 720  # pixels of a shown image's longer side
LOG_ODDS_SCALE = 6.0  # log-odds that fill half of a bar


def render(report: Row, open_image: "Callable[[str], Image]") -> str:
    """The page. `open_image` takes a uri and gives a picture; a RowError or OSError of it is told in its place."""
    env = pages()
    env.filters |= {"tint": tint, "edge": edge, "bar": log_odds_bar}
    pictures = {
        image["image_id"]: picture(image["uri"], open_image)
        for example in report["examples"]
        for image in example["images"]
    }
    return env.get_template("report.html.j2").render(
        r=report,
        pictures=pictures,
        arm_name=_arm_name,
        source_name=lambda source: SOURCE_NAMES.get(source, source),
        gate_names=GATE_NAMES,
        role_names={f"chosen_{arm}": f"chosen by “{_arm_name(arm)}”" for arm in report["arms"]} | ROLE_NAMES,
        kind_names=KIND_NAMES,
        tiles=_tiles(report),
        lead=lead(report),
        legend=[(charts.key(line), line.name) for line in _lines(report, "best_of_n")],
        over_n={how: _over_n(report, how) for how in ("best_of_n", "sc_rm")},
        step_arms=[arm for arm in report["arms"] if arm != "shuffled_image"],
        step_charts=_step_charts(report),
        step_keys={arm: charts.key(_series(arm, [])) for arm in report["arms"]},
        total_seconds=sum(step["seconds"] for step in report["steps"]),
        longest=max((step["seconds"] for step in report["steps"]), default=0.0) or 1.0,
    )


def pages() -> Environment:
    """The environment of this package's pages: everything escaped, nothing undefined, numbers as words."""
    env = Environment(loader=PackageLoader("medmm_ray.pages"), autoescape=True, undefined=StrictUndefined)
    env.filters |= {
        "pct": percent,
        "fixed": fixed,
        "signed": signed,
        "count": count,
        "duration": duration,
        "words": words,
    }
    return env


# Numbers as words


def words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def fixed(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` decimals, in scientific form where they would all be zero."""
    if value is None:
        return "–"
    small = value != 0 and abs(value) < 10**-digits / 2
    return (f"{value:.0e}" if small else f"{value:.{digits}f}").replace("-", "−")


def signed(value: float) -> str:
    """With its sign and one decimal; a value that rounds to zero has none."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm.replace("_", " ").capitalize())


# Colours of a probability: orange (wrong) over grey (unsure) to blue (right)


def _mix(probability: float, wrong: Sequence[int], unsure: Sequence[int], right: Sequence[int]) -> str:
    far = right if probability >= 0.5 else wrong
    weight = abs(2 * probability - 1)
    return "#" + "".join(f"{round(u + (f - u) * weight):02x}" for u, f in zip(unsure, far, strict=True))


def tint(probability: float) -> str:
    """A step's background, pale enough for dark text."""
    return _mix(probability, (252, 218, 192), (244, 244, 242), (199, 224, 241))


def edge(probability: float) -> str:
    """A step's left edge, in the full colour."""
    return _mix(probability, (213, 94, 0), (176, 178, 180), (0, 114, 178))


def log_odds_bar(log_odds: float) -> Markup:
    """A bar from the middle: to the right (blue) for +, to the left (orange) for −; cut at the scale's end."""
    width = min(abs(log_odds) / LOG_ODDS_SCALE, 1) * 50
    start, colour = (50.0, BLUE) if log_odds >= 0 else (50 - width, ORANGE)
    body = (
        '<rect x="0" y="3" width="100" height="6" fill="#eceef0"/>'
        f'<rect x="{start:.1f}" y="2" width="{width:.1f}" height="8" fill="{colour}"/>'
        f'<line x1="50" x2="50" y1="0" y2="12" stroke="{INK}" stroke-width="1"/>'
    )
    head = '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
    return Markup(f"{head}{body}</svg>")  # noqa: S704 - numbers only


# Pictures


def picture(uri: str, open_image: "Callable[[str], Image]") -> str | None:
    """A data URI of the image, small ones enlarged and large ones reduced; None where it cannot be opened."""
    try:
        image = open_image(uri)
    except (RowError, OSError):
        return None
    longer = max(image.size)
    factor = min(max(longer, SMALLEST_SIDE), LARGEST_SIDE) / longer
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    stream = io.BytesIO()
    image.convert("RGB").resize(size, resample=3).save(stream, "JPEG", quality=88)  # 3: bicubic
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# Figures


def _series(arm: str, points: Sequence[tuple[float, float, float, float]]) -> Series:
    colour, shape, dash = ARM_STYLES.get(arm, (INK, "square", "3 3"))
    return Series(_arm_name(arm), colour, shape, dash, points)


def _lines(report: Row, how: str) -> list[Series]:
    """The scorers' lines and, to compare, oracle, majority vote and one sample."""
    accuracy, ns = report["accuracy"], report["ns"]

    def over(figures: Row) -> list[tuple[float, float, float, float]]:
        found = [figures[str(n)] for n in ns]
        return [(float(i), f["value"], f["low"], f["high"]) for i, f in enumerate(found)]

    one = {str(n): accuracy["one_sample"] for n in ns}
    arms = [_series(arm, over(accuracy[how][arm])) for arm in report["arms"]]
    return [
        Series("Oracle (any sample right)", INK, "none", "2 4", over(accuracy["oracle"])),
        *sorted(arms, key=lambda line: -line.points[-1][1]),
        Series("Majority vote", GREEN, "diamond", "", over(accuracy["majority"])),
        Series("One sample", GREY, "none", "9 4", over(one)),
    ]


def _over_n(report: Row, how: str) -> Markup:
    label = {"best_of_n": "Accuracy of best-of-N over N", "sc_rm": "Accuracy of the reward-weighted vote over N"}[how]
    return charts.lines_over_n(_lines(report, how), report["ns"], label)


def _step_charts(report: Row) -> Row:
    """ROC and calibration of the arms that claim to be right (not the shuffled control), a histogram for each."""
    step = {arm: figures for arm, figures in report["step"].items() if arm != "shuffled_image" and figures["steps"]}
    styled = [(arm, _series(arm, []), figures) for arm, figures in step.items()]
    if not styled:
        return {}
    return {
        "roc": charts.roc(
            [(s.name, s.colour, s.dash, f["roc"]["false"], f["roc"]["true"]) for _, s, f in styled], "ROC of steps"
        ),
        "calibration": charts.calibration(
            [(s.name, s.colour, s.mark, f["calibration"]) for _, s, f in styled], "Calibration of step probabilities"
        ),
        "histograms": {
            arm: charts.histogram(f["histogram"]["right"], f["histogram"]["wrong"], f"Step scores, {s.name}")
            for arm, s, f in styled
        },
    }


# The headline


def headline(report: Row) -> list[tuple[str, str, Row]]:
    """(name, kind, {value, low, high}) of the figures that matter, best first to read; all at the largest N."""
    accuracy, n = report["accuracy"], str(report["n"])
    order = [arm for arm in ("multimodal", "text_only", "shuffled_image") if arm in report["arms"]]
    order += [arm for arm in report["arms"] if arm not in order]
    rows = [(f"{_arm_name(arm)}, best of {n}", arm, accuracy["best_of_n"][arm][n]) for arm in order]
    rows += [(f"{_arm_name(arm)}, weighted vote", f"sc_rm_{arm}", accuracy["sc_rm"][arm][n]) for arm in order]
    rows.append(("One sample", "one_sample", accuracy["one_sample"]))
    rows.append((f"Majority vote of {n}", "majority", accuracy["majority"][n]))
    rows.append((f"Oracle of {n}", "oracle", accuracy["oracle"][n]))
    return rows


def lead(report: Row) -> str:
    """One sentence with the main result, whatever it is."""
    accuracy, n = report["accuracy"], str(report["n"])
    one = percent(accuracy["one_sample"]["value"])
    if "gain" not in accuracy:
        arms = "; ".join(f"{_arm_name(a)} {percent(accuracy['best_of_n'][a][n]['value'])}" for a in report["arms"])
        return f"One sample is right for {one} of the questions. Best of {n}: {arms or 'no scores'}."
    gain = accuracy["gain"]["best_of_n"][n]
    points = [f"{100 * gain[key]:.1f}".replace("-", "−") for key in ("value", "low", "high")]
    return (
        f"One sample answers {one} of the questions rightly. Choosing the best of {n} by the multimodal scorer answers "
        f"{percent(accuracy['best_of_n']['multimodal'][n]['value'])}, by the same scorer without the image "
        f"{percent(accuracy['best_of_n']['text_only'][n]['value'])}: the image is worth {points[0]} points "
        f"(95\u00a0% interval {points[1]} to {points[2]})."
    )


def _tiles(report: Row) -> list[Row]:
    return [
        {"name": name, "kind": kind, **figure}
        for name, kind, figure in headline(report)
        if not kind.startswith("sc_rm")
    ]


def summary(report: Row) -> RenderableType:
    """The headline table for a terminal."""
    counts = report["counts"]
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("accuracy")
    table.add_column("", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, kind, figure in headline(report):
        style = "bold" if kind == "multimodal" else ""
        interval = f"{100 * figure['low']:.1f} – {100 * figure['high']:.1f}"
        table.add_row(name, percent(figure["value"]), interval, style=style)
    lines: list[RenderableType] = [
        Text(f"{count(counts['questions'])} {counts['split']} questions, {count(counts['solutions'])} solutions"),
        table,
    ]
    for arm, figures in report["step"].items():
        if figures["steps"] and arm != "shuffled_image":
            words = (
                f"AUROC {fixed(figures['auroc'])}  macro-F1 {fixed(figures['macro_f1'])}  ECE {fixed(figures['ece'])}"
            )
            against = "" if report["reference"] in TRUTHS else f" (against {report['reference']})"
            lines.append(Text(f"steps, {_arm_name(arm).lower()}{against}: {words}"))
    kappa = report["agreement"].get("judge_expert", {}).get("kappa")
    lines.append(Text(f"judge and expert: κ {fixed(kappa)}"))
    failed = {name: sum(kinds.values()) for name, kinds in counts["errors"].items() if kinds}
    if failed:
        lines.append(Text("failed rows: " + ", ".join(f"{name} {number}" for name, number in failed.items())))
    return Group(*lines)
