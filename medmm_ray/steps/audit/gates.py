"""The quality gates: each figure beside its target, whether it is met, and what to do where it is not.

A figure on the edge of a target's range is inside; "above" is strict.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from medmm_ray.config import JsonObject

if TYPE_CHECKING:
    from medmm_ray.steps.audit import AuditConfig

Target = tuple[float | None, float | None]
"""Range of good values; an end is None where it is open."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A figure with its 95 % interval, and whether it meets its target.

    `passed` is None where there is no figure; `certain` says that the whole interval lies on the same side of the
    target as the figure; `strict` that a figure on the lower end of an open range fails.
    """

    name: str
    title: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    target: list[float | None]
    strict: bool
    passed: bool | None
    certain: bool
    detail: str
    advice: str


# What to do where a figure lies (below, above) its range.
KAPPA = (
    "Read the steps on which judge and expert differ (review_queue, expert_labels). If one kind of step or modality "
    "stands out, mend the judge's prompt, or show it documents and the image. If none does, take another judge, or run "
    "Monte Carlo on whole solutions and train with label_policy=consensus."
)
EASY = (
    "Either easy questions are not easy for this policy (look at the right answers among them), or the judge calls "
    "right steps wrong: read some wrong steps of right answers."
)
WEAK = "The policy is too weak for these questions, or the judge too strict: look at the judge's agreement first."
STRONG = "The policy is too good for these questions: add harder ones, or raise sample.temperature."
LENGTH = "The policy's prompt and demonstrations set how long a step is; sample.min_steps and max_steps what is kept."
SOURCES = "Add a source that has the missing ones (ingest.source), or name those that you want in audit.modalities."
LEAKS = "Curate again with curate.leakage=resplit and retrieve anew: until then figures on the test split are void."
COST = "Judge fewer solutions (judge.max_solutions), lower sample.num_samples_train, or read fewer steps."
ADVICE = {
    "judge_expert_kappa": (KAPPA, KAPPA),
    "positive_share": (WEAK, STRONG),
    "easy_positive": (EASY, EASY),
    "hard_positive": (WEAK, STRONG),
    "mean_steps": (f"{LENGTH} At most 9 steps cannot average above 9.", LENGTH),
    "modalities": (SOURCES, SOURCES),
    "leakage": (LEAKS, LEAKS),
    "cost": (COST, COST),
}
UNKNOWN = {
    "judge_expert_kappa": "No step has both a judge's and an expert's label yet: let an expert read the review queue.",
    "mean_steps": "No solution is there yet: run sample.",
    "cost": "No budget is set: audit.max_cost_usd.",
}
NO_LABELS = "No label of a right or a wrong step is there yet: run judge."


class GateError(RuntimeError):
    """Gates that are required and fail."""


def require(report: JsonObject) -> None:
    """Raise `GateError`, with the figures, where a gate fails; one without a figure does not."""
    faults = []
    for gate in report["gates"]:
        # None: without a figure a gate is neither met nor missed.
        if gate["passed"] is False:
            figure = figure_text(gate["value"], gate["unit"])
            faults.append(f"{gate['title']} {figure}, wanted {target_text(gate)}")
    if not faults:
        return
    raise GateError(
        f"{len(faults)} of {len(report['gates'])} quality gates fail: {'; '.join(faults)}. dataset_report.html, in the "
        "run's folder, says what to do; audit.gates=report goes on all the same"
    )


def figure_text(value: float | None, unit: str) -> str:
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
    else:
        text = f"${value:,.2f}"
    # A minus sign, as a hyphen reads like a range.
    return text.replace("-", "−")


def target_text(gate: JsonObject) -> str:
    """A gate's target in words: above, at least, at most, or a range."""
    low, high = gate["target"]
    unit = gate["unit"]
    if low is not None and high is not None:
        return f"{_limit_text(low, unit).removesuffix(' %')}–{_limit_text(high, unit)}"
    if low is not None:
        return f"{'>' if gate['strict'] else '≥'} {_limit_text(low, unit)}"
    if high is None:
        return "–"
    return "none" if high == 0 else f"≤ {_limit_text(high, unit)}"


def _limit_text(limit: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * limit:g} %"
    return f"${limit:,.0f}" if unit == "dollars" else f"{limit:g}"


def gates(config: "AuditConfig", report: JsonObject) -> list[JsonObject]:
    """All gates, each a `Gate` as JSON, in the order in which they are worth reading."""
    # Of one source alone: shares of judge and Monte Carlo are of different things.
    shares = _shares_of_right_steps(report)
    by_difficulty = shares.get("difficulty", {})
    all_gates = [
        _kappa_gate(config, report),
        _gate("positive_share", "Right steps", "share", shares.get("all", {}).get("all"), config.positive_share),
        _gate(
            "easy_positive",
            "Right steps, easy questions",
            "share",
            by_difficulty.get("easy"),
            (config.min_easy_positive, None),
        ),
        _gate("hard_positive", "Right steps, hard questions", "share", by_difficulty.get("hard"), config.hard_positive),
        _step_gate(config, report["steps"]),
        _modality_gate(config, report["coverage"]["modalities"]),
        _leakage_gate(report["leakage"]),
        _cost_gate(config, report["cost"]["total"]),
    ]
    return [asdict(gate) for gate in all_gates]


def _shares_of_right_steps(report: JsonObject) -> JsonObject:
    """The shares of right steps, by group, of the source that speaks for the dataset."""
    for entry in report["balance"]:
        if entry["source"] == report["source"]:
            shares: JsonObject = entry["share"]
            return shares
    return {}


def _kappa_gate(config: "AuditConfig", report: JsonObject) -> Gate:
    name, title = "judge_expert_kappa", "Judge agrees with the expert"
    target = (config.min_kappa, None)
    for pair in report["agreement"]:
        if (pair["first"], pair["second"]) != ("judge", "expert"):
            continue
        figure = pair["kappa"]["all"]["all"]
        detail = f"{figure['count']:,} steps of {figure['questions']:,} questions"
        if pair["weighted"]:
            # The queue draws disputed steps more often: many steps of small weight tell less than as many equal ones.
            detail += f", weighted; worth {figure['effective']:.0f} equal ones"
        return _gate(name, title, "kappa", figure, target, detail=detail)
    return _gate(name, title, "kappa", None, target)


def _step_gate(config: "AuditConfig", steps: JsonObject) -> Gate:
    detail = ""
    if steps["solutions"]:
        fewest, most = config.usual_steps
        few = 100 * steps["few"] / steps["solutions"]
        many = 100 * steps["many"] / steps["solutions"]
        detail = f"fewer than {fewest}: {few:.1f} %, more than {most}: {many:.1f} % of the solutions"
    return _gate("mean_steps", "Steps a solution, mean", "steps", steps["mean"], config.mean_steps, detail=detail)


def _modality_gate(config: "AuditConfig", coverage: JsonObject) -> Gate:
    present: list[str] = []
    absent: list[str] = []
    for modality in config.modalities:
        has_questions = coverage.get(modality, {}).get("questions")
        (present if has_questions else absent).append(modality)
    return _gate(
        "modalities",
        "Modalities present",
        "count",
        _exact(len(present)),
        (len(config.modalities), None),
        strict=False,
        detail=f"missing: {', '.join(absent)}" if absent else ", ".join(present),
    )


def _leakage_gate(checks: list[JsonObject]) -> Gate:
    total = 0
    leaks = []
    for check in checks:
        if check["count"]:
            total += check["count"]
            leaks.append(f"{check['name'].replace('_', ' ')} {check['count']}")
    return _gate("leakage", "Shared between splits", "count", _exact(total), (None, 0), detail=", ".join(leaks))


def _cost_gate(config: "AuditConfig", total: float) -> Gate:
    return _gate(
        "cost",
        "Paid to APIs and readers",
        "dollars",
        _exact(total) if config.max_cost_usd is not None else None,
        (None, config.max_cost_usd),
        detail="time on own GPUs is not in it",
    )


def _exact(value: float) -> JsonObject:
    """A figure that was counted, not estimated: its interval is itself."""
    return {"value": value, "low": value, "high": value}


def _gate(
    name: str,
    title: str,
    unit: str,
    figure: JsonObject | None,
    target: Target,
    strict: bool = True,
    detail: str = "",
) -> Gate:
    """A gate. A target that is open above is "above" its lower end, strictly unless `strict` is false."""
    value = low = high = None
    if figure:
        value, low, high = figure["value"], figure["low"], figure["high"]
    # Of a range both ends are inside.
    strict = strict and target[1] is None
    side = _side(value, target, strict)
    low_side, high_side = _side(low, target, strict), _side(high, target, strict)
    return Gate(
        name=name,
        title=title,
        unit=unit,
        value=value,
        low=low,
        high=high,
        target=list(target),
        strict=strict,
        passed=None if side is None else side == 0,
        certain=low_side is not None and low_side == high_side,
        detail=detail,
        advice=_advice(name, figure, side),
    )


def _side(number: float | None, target: Target, strict: bool) -> int | None:
    """-1 below the range, 0 in it, 1 above it; None without a number."""
    if number is None:
        return None
    bottom, top = target
    # Strict: a figure on the lower end itself fails, as in "kappa above .8".
    if bottom is not None and (number <= bottom if strict else number < bottom):
        return -1
    return 1 if top is not None and number > top else 0


def _advice(name: str, figure: JsonObject | None, side: int | None) -> str:
    """What to do where the figure lies outside its range, or where there is none."""
    if side is None:
        # Kappa has no value where either rater uses one class alone, however many steps they share.
        if name == "judge_expert_kappa" and figure:
            return (
                "Judge or expert call every shared step alike, so that kappa is not defined: let the expert read more."
            )
        return UNKNOWN.get(name, NO_LABELS)
    below, above = ADVICE[name]
    return {-1: below, 0: "", 1: above}[side]
