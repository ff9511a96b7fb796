"""An `EvaluationReport` -> report.html (one self-contained page) and the few lines that end a run on the terminal.

Enters: the report, and a function that opens an image's uri. Leaves: HTML
with inline styles, SVG figures and pictures; it loads nothing from anywhere. Everything from the data is escaped.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medmm_ray.data.tables import RowError
from medmm_ray.pages import charts
from medmm_ray.pages.charts import Bin, CalibrationCurve, Point, RocCurve, Series
from medmm_ray.pages.svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE
from medmm_ray.stats.grouped_stats import Figure
from medmm_ray.stats.metrics import CalibrationBin
from medmm_ray.steps.evaluate.accuracy import DECODERS, Accuracy, AccuracyByN, GroupAccuracy
from medmm_ray.steps.evaluate.examples import OVERRATED, UNDERRATED
from medmm_ray.steps.evaluate.gates import limit_of
from medmm_ray.steps.evaluate.outcomes import NO_ANSWER
from medmm_ray.steps.evaluate.report import EvaluationReport
from medmm_ray.steps.evaluate.steps import TRUTHS, StepFigures

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROL = "shuffled_image"  # an arm that is no scorer: it shows what is left of a gain without the right image
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
    OVERRATED: "A wrong step held for right",
    UNDERRATED: "A right step held for wrong",
}
SMALLEST_SIDE, LARGEST_SIDE = 360, 720  # pixels of a shown image's longer side
LOG_ODDS_SCALE = 6.0  # log-odds that fill half of a bar


def render(report: EvaluationReport, open_image: "Callable[[str], Image]") -> str:
    """The page. `open_image` takes a uri and gives a picture; a RowError or OSError of it is told in its place."""
    env = pages()
    env.filters |= {"tint": tint, "edge": edge, "bar": log_odds_bar, "ends": ends}
    arms = report.arms
    chosen_names = {f"chosen_{arm}": f"chosen by “{_arm_name(arm)}”" for arm in arms}
    seconds = [step.seconds for step in report.steps]
    return env.get_template("report.html.j2").render(
        r=report,
        pictures=_pictures(report, open_image),
        arm_name=_arm_name,
        source_name=lambda source: SOURCE_NAMES.get(source, source),
        limit_of=limit_of,
        answer_columns=_answer_columns,
        role_names=chosen_names | ROLE_NAMES,
        kind_names=KIND_NAMES,
        tiles=_tiles(report),
        group_tables=_group_tables(report),
        lead=lead(report),
        legend=[(charts.key(line), line.name) for line in _lines(report, "best_of_n")],
        over_n={decoder: _over_n(report, decoder) for decoder in DECODERS},
        step_arms=[arm for arm in arms if arm != CONTROL],
        step_charts=_step_charts(report),
        step_keys={arm: charts.key(_series(arm, [])) for arm in arms},
        total_seconds=sum(seconds),
        longest=max(seconds, default=0.0) or 1.0,
    )


def _pictures(report: EvaluationReport, open_image: "Callable[[str], Image]") -> dict[str, str | None]:
    """The examples' images as data URIs, by image_id."""
    uris: dict[str, str] = {}
    for example in (*report.examples, *report.disagreements):
        # Examples may share an image: it is opened and embedded once.
        for image in example.images:
            uris[image.image_id] = image.uri
    return {image_id: picture(uri, open_image) for image_id, uri in uris.items()}


def pages() -> Environment:
    """The environment of this package's pages: everything escaped, nothing undefined, numbers as words."""
    # A name that is misspelt in a template is an error there, not an empty place on the page.
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
    """A name in code as words, the first one with a capital."""
    return name.replace("_", " ").capitalize()


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def fixed(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` decimals, in scientific form where they would all be zero."""
    if value is None:
        return "–"
    # A small difference shown as 0.000 would look like none.
    is_small = value != 0 and abs(value) < 10**-digits / 2
    number = f"{value:.0e}" if is_small else f"{value:.{digits}f}"
    return number.replace("-", "−")


def signed(value: float) -> str:
    """A figure with its sign and one decimal; one that rounds to zero has no sign."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def count(value: int | None) -> str:
    """A number with its thousands apart; a dash where there is none."""
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    # Rounded before it is split: 119.7 s are 2 min 00 s, not 1 min 60 s.
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def ends(figure: Figure) -> str:
    """The ends of a share's interval in percent; a dash where there is none."""
    if figure.low is None or figure.high is None:
        return "–"
    return f"{100 * figure.low:.1f}–{100 * figure.high:.1f}".replace("-", "−")


def _answer_columns(table: Mapping[str, Mapping[str, int]]) -> list[str]:
    """All answers, right or chosen, sorted; "none" last."""
    names = set(table)
    for row in table.values():
        names.update(row)
    return sorted(names, key=lambda name: (name == NO_ANSWER, name))


def _group_tables(report: EvaluationReport) -> dict[str, dict[str, GroupAccuracy]]:
    """The accuracies by group, by what they are grouped by."""
    return {
        "data set": report.by_dataset,
        "difficulty": report.by_difficulty,
        "modality": report.by_modality,
        "answer": report.by_answer_type,
        "kind": report.by_published_type,
        "topic": report.by_topic,
        "question": report.by_question,
    }


def _arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm.replace("_", " ").capitalize())


# Colours of a probability: orange (wrong) over grey (unsure) to blue (right)


def _mix(
    probability: float,
    wrong: Sequence[int],
    unsure: Sequence[int],
    right: Sequence[int],
) -> str:
    # At one half both ends meet in the middle's grey.
    end = right if probability >= 0.5 else wrong
    weight = abs(2 * probability - 1)
    colour = "#"
    for grey, full in zip(unsure, end, strict=True):
        channel = round(grey + (full - grey) * weight)
        colour += f"{channel:02x}"
    return colour


def tint(probability: float) -> str:
    """A step's background, pale enough for dark text."""
    return _mix(
        probability,
        (252, 218, 192),
        (244, 244, 242),
        (199, 224, 241),
    )


def edge(probability: float) -> str:
    """A step's left edge, in the full colour."""
    return _mix(
        probability,
        (213, 94, 0),
        (176, 178, 180),
        (0, 114, 178),
    )


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
        # One lost file must not cost the whole report.
        return None
    longer = max(image.size)
    factor = min(max(longer, SMALLEST_SIDE), LARGEST_SIDE) / longer
    width = max(1, round(image.width * factor))
    height = max(1, round(image.height * factor))
    # A small image would be a stamp on the page, a large one megabytes of it.
    scaled = image.convert("RGB").resize((width, height), resample=3)  # bicubic
    stream = io.BytesIO()
    scaled.save(stream, "JPEG", quality=88)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/jpeg;base64,{encoded}"


# Figures


def _series(arm: str, points: Sequence[Point]) -> Series:
    colour, shape, dash = ARM_STYLES.get(arm, (INK, "square", "3 3"))
    return Series(_arm_name(arm), colour, shape, dash, points)


def _lines(report: EvaluationReport, decoder: str) -> list[Series]:
    """The scorers' lines and, to compare, oracle, majority vote and one sample."""
    accuracy = report.accuracy
    ns = [str(n) for n in report.ns]
    by_arm = accuracy.of(decoder)
    arms = [_series(arm, _points(by_arm[arm], ns)) for arm in report.arms]
    arms.sort(key=lambda line: -line.points[-1].value)  # in the legend as they end in the chart
    # The same at each N: a level line to compare with.
    one_sample = dict.fromkeys(ns, accuracy.one_sample)
    return [
        Series("Oracle (any sample right)", INK, "none", "2 4", _points(accuracy.oracle, ns)),
        *arms,
        Series("Majority vote", GREEN, "diamond", "", _points(accuracy.majority, ns)),
        Series("One sample", GREY, "none", "9 4", _points(one_sample, ns)),
    ]


def _points(figures: AccuracyByN, ns: Sequence[str]) -> list[Point]:
    """The figures of each N, at equal distances."""
    points = []
    for place, n in enumerate(ns):
        figure = figures[n]
        # Of a single group of questions there is no band: it is drawn as a line.
        low = figure.value if figure.low is None else figure.low
        high = figure.value if figure.high is None else figure.high
        points.append(Point(float(place), figure.value, low, high))
    return points


def _over_n(report: EvaluationReport, decoder: str) -> Markup:
    labels = {"best_of_n": "Accuracy of best-of-N over N", "sc_rm": "Accuracy of the reward-weighted vote over N"}
    return charts.lines_over_n(_lines(report, decoder), report.ns, labels[decoder])


@dataclass(frozen=True)
class _StepCharts:
    roc: Markup
    calibration: Markup
    histograms: Mapping[str, Markup]


def _step_charts(report: EvaluationReport) -> _StepCharts | None:
    """ROC and calibration of the arms that claim to be right (not the shuffled control), a histogram for each."""
    roc_curves = []
    calibration_curves = []
    histograms = {}
    for arm, figures in report.step.items():
        if arm == CONTROL or not figures.steps:
            continue
        style = _series(arm, [])
        counts = figures.histogram
        roc_curves.append(RocCurve(style.colour, style.dash, figures.roc.false, figures.roc.true))
        calibration_curves.append(CalibrationCurve(style.colour, style.mark, _bins(figures.calibration)))
        histograms[arm] = charts.histogram(counts.right, counts.wrong, f"Step scores, {style.name}")
    if not histograms:
        return None
    return _StepCharts(
        roc=charts.roc(roc_curves, "ROC of steps"),
        calibration=charts.calibration(calibration_curves, "Calibration of step probabilities"),
        histograms=histograms,
    )


def _bins(calibration: Sequence[CalibrationBin]) -> list[Bin]:
    """The bins that hold any step: the others have no mean."""
    bins = []
    for calibration_bin in calibration:
        mean, share = calibration_bin.mean_probability, calibration_bin.share_right
        if mean is not None and share is not None:
            bins.append(Bin(mean, share, calibration_bin.count))
    return bins


def charts_of(report: EvaluationReport) -> dict[str, Markup]:
    """The page's charts by name."""
    drawings = {decoder: _over_n(report, decoder) for decoder in DECODERS}
    steps = _step_charts(report)
    if steps is not None:
        drawings |= {"roc": steps.roc, "calibration": steps.calibration}
        for arm, histogram in steps.histograms.items():
            drawings[f"step_scores_{arm}"] = histogram
    return drawings


# The headline


@dataclass(frozen=True)
class Headline:
    """A figure that matters: its name to read, its kind (the arm or the rule that it is of), and the figure."""

    name: str
    kind: str
    figure: Accuracy


def headline(report: EvaluationReport) -> list[Headline]:
    """The figures that matter, best first to read; all at the largest N."""
    accuracy = report.accuracy
    n = str(report.n)
    # The usual arms in the order in which they are compared, then any others.
    present = set(report.arms)
    usual = [arm for arm in ("multimodal", "text_only", CONTROL) if arm in present]
    arms = list(dict.fromkeys([*usual, *report.arms]))
    headlines = []
    for arm in arms:
        headlines.append(Headline(f"{_arm_name(arm)}, best of {n}", arm, accuracy.best_of_n[arm][n]))
    for arm in arms:
        headlines.append(Headline(f"{_arm_name(arm)}, weighted vote", f"sc_rm_{arm}", accuracy.sc_rm[arm][n]))
    headlines.append(Headline("One sample", "one_sample", accuracy.one_sample))
    headlines.append(Headline(f"Majority vote of {n}", "majority", accuracy.majority[n]))
    headlines.append(Headline(f"Oracle of {n}", "oracle", accuracy.oracle[n]))
    return headlines


def lead(report: EvaluationReport) -> str:
    """One sentence with the main result, whatever it is."""
    accuracy = report.accuracy
    n = str(report.n)
    one_sample = percent(accuracy.one_sample.value)
    best = {arm: percent(accuracy.best_of_n[arm][n].value) for arm in report.arms}
    if accuracy.gain is None:
        results = "; ".join(f"{_arm_name(arm)} {share}" for arm, share in best.items()) or "no scores"
        return f"One sample is right for {one_sample} of the questions. Best of {n}: {results}."
    gain = accuracy.gain.best_of_n[n]
    value = f"{100 * gain.value:.1f}".replace("-", "−")
    interval = ends(gain).replace("–", " to ")
    return (
        f"One sample answers {one_sample} of the questions rightly. Choosing the best of {n} by the multimodal scorer "
        f"answers {best['multimodal']}, by the same scorer without the image {best['text_only']}: the image is worth "
        f"{value} points (95\u00a0% interval {interval})."
    )


def _tiles(report: EvaluationReport) -> list[Headline]:
    """The figures at the top of the page."""
    # The weighted vote stands in the chart and the terminal's table: the top has room for few.
    return [entry for entry in headline(report) if not entry.kind.startswith("sc_rm")]


# The terminal


def summary(report: EvaluationReport) -> RenderableType:
    """The headline table for a terminal, and a line each for steps, judge and failed rows."""
    counts = report.counts
    sizes = f"{count(counts.questions)} {counts.split} questions, {count(counts.solutions)} solutions"
    lines: list[RenderableType] = [Text(sizes), _headline_table(report)]
    for arm, figures in report.step.items():
        if figures.steps and arm != CONTROL:
            lines.append(_step_line(arm, figures, report.reference))
    judge_expert = report.agreement.get("judge_expert")
    lines.append(Text(f"judge and expert: κ {fixed(judge_expert.kappa if judge_expert else None)}"))
    failed = []
    for table, kinds in counts.errors.items():
        if kinds:
            failed.append(f"{table} {sum(kinds.values())}")
    if failed:
        lines.append(Text("failed rows: " + ", ".join(failed)))
    return Group(*lines)


def _headline_table(report: EvaluationReport) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("accuracy")
    table.add_column("", justify="right")
    table.add_column("95 % interval", justify="right")
    for entry in headline(report):
        figure = entry.figure
        interval = ends(figure).replace("–", " – ")
        style = "bold" if entry.kind == "multimodal" else ""
        table.add_row(entry.name, percent(figure.value), interval, style=style)
    return table


def _step_line(arm: str, figures: StepFigures, reference: str) -> Text:
    """How well an arm tells right steps from wrong ones; against what, where that is no truth."""
    against = "" if reference in TRUTHS else f" (against {reference})"
    auroc = fixed(figures.auroc)
    macro_f1 = fixed(figures.macro_f1)
    ece = fixed(figures.ece)
    scorer = _arm_name(arm).lower()
    return Text(f"steps, {scorer}{against}: AUROC {auroc}  macro-F1 {macro_f1}  ECE {ece}")
