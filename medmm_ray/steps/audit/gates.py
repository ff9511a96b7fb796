"""The quality gates: each figure beside its target, whether it is met, and what to do where it is not.

A gate is {name, title, unit, value, low, high, target, wanted, passed, certain, detail, advice}. `target` is the range
of good values [low, high], an end None where it is open; `passed` is None where there is no figure; `certain` says that
the whole interval lies on the same side as the figure. A figure on the edge of a range is inside; "above" is strict.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmm_ray.steps.audit import AuditConfig

Row = dict[str, Any]
Target = tuple[float | None, float | None]

# What to do where a figure lies (below, above) its range.
KAPPA = (
    "Read the steps on which judge and expert differ (review_queue, expert_labels). If one kind of step or modality "
    "stands out, mend the judge's prompt, or show it documents and the image. If none does, take another judge, or run "
    "Monte Carlo on whole solutions and train on policy consensus."
)
EASY = (
    "Either easy questions are not easy for this policy (look at the right answers among them), or the judge calls "
    "right steps wrong: read some wrong steps of right answers."
)
WEAK = "The policy is too weak for these questions, or the judge too strict: look at the judge's agreement first."
STRONG = "The policy is too good for these questions: add harder ones, or sample hotter (sample.temperature)."
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


def require(report: Row) -> None:
    """Raise `GateError`, with the figures, where a gate fails; one without a figure does not."""
    failed = [gate for gate in report["gates"] if gate["passed"] is False]
    if failed:
        words = "; ".join(f"{g['title']} {spoken(g['value'], g['unit'])}, wanted {wanted(g)}" for g in failed)
        raise GateError(
            f"{len(failed)} of {len(report['gates'])} quality gates fail: {words}. dataset_report.html, in the run's "
            "folder, says what to do; audit.gates=report goes on all the same"
        )


def spoken(value: float | None, unit: str) -> str:
    """A gate's figure in its unit."""
    if value is None:
        return "–"
    forms = {
        "share": f"{100 * value:.1f} %",
        "kappa": f"{value:.3f}",
        "steps": f"{value:.2f}",
        "count": f"{value:,.0f}",
    }
    return forms.get(unit, f"${value:,.2f}").replace("-", "−")


def wanted(gate: Row) -> str:
    """A gate's target in words: above, at least, at most, or a range."""
    unit = gate["unit"]
    low, high = (None if end is None else _short(end, unit) for end in gate["target"])
    if low is not None and high is not None:
        return f"{low.removesuffix(' %')}–{high}"
    if low is not None:
        return f"{'>' if gate['strict'] else '≥'} {low}"
    return "–" if high is None else "none" if gate["target"][1] == 0 else f"≤ {high}"


def _short(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:g} %"
    return f"${value:,.0f}" if unit == "dollars" else f"{value:g}"


def gates(config: "AuditConfig", report: Row) -> list[Row]:
    """All gates, in the order in which they are worth reading."""
    share = _shares(report)
    expert = _pair(report, "judge", "expert")
    kappa = expert["kappa"]["all"]["all"] if expert else None
    modalities = [m for m in config.modalities if report["coverage"]["modalities"].get(m, {}).get("questions")]
    absent = [m for m in config.modalities if m not in modalities]
    leaks = [check for check in report["leakage"] if check["count"]]
    steps = report["steps"]
    return [
        _gate("judge_expert_kappa", "Judge agrees with the expert", "kappa", kappa, (config.min_kappa, None),
              detail=_kappa_words(expert)),
        _gate("positive_share", "Right steps", "share", share.get("all", {}).get("all"), config.positive_share),
        _gate("easy_positive", "Right steps, easy questions", "share", share.get("difficulty", {}).get("easy"),
              (config.min_easy_positive, None)),
        _gate("hard_positive", "Right steps, hard questions", "share", share.get("difficulty", {}).get("hard"),
              config.hard_positive),
        _gate("mean_steps", "Steps a solution, mean", "steps", steps["mean"], config.mean_steps,
              detail=_step_words(steps, config.usual_steps)),
        _gate("modalities", "Modalities present", "count", _exact(len(modalities)), (len(config.modalities), None),
              strict=False, detail=f"missing: {', '.join(absent)}" if absent else ", ".join(modalities)),
        _gate("leakage", "Shared between splits", "count", _exact(sum(check["count"] for check in leaks)), (None, 0),
              detail=", ".join(f"{check['name'].replace('_', ' ')} {check['count']}" for check in leaks)),
        _gate("cost", "Paid to APIs and readers", "dollars",
              _exact(report["cost"]["total"]) if config.max_cost_usd is not None else None,
              (None, config.max_cost_usd), detail="time on own GPUs is not in it"),
    ]  # fmt: skip


def _shares(report: Row) -> Row:
    """The shares of right steps by the source that speaks for the dataset."""
    found: Row = next((entry["share"] for entry in report["balance"] if entry["source"] == report["source"]), {})
    return found


def _pair(report: Row, first: str, second: str) -> Row | None:
    return next((p for p in report["agreement"] if (p["first"], p["second"]) == (first, second)), None)


def _kappa_words(pair: Row | None) -> str:
    if pair is None:
        return ""
    figure = pair["kappa"]["all"]["all"]
    weighted = f", weighted; worth {figure['effective']:.0f} equal ones" if pair["weighted"] else ""
    return f"{figure['count']:,} steps of {figure['questions']:,} questions{weighted}"


def _step_words(steps: Row, usual: tuple[int, int]) -> str:
    if not steps["solutions"]:
        return ""
    few, many = (100 * steps[name] / steps["solutions"] for name in ("few", "many"))
    return f"fewer than {usual[0]}: {few:.1f} %, more than {usual[1]}: {many:.1f} % of the solutions"


def _exact(value: float) -> Row:
    return {"value": value, "low": value, "high": value}


def _gate(
    name: str,
    title: str,
    unit: str,
    figure: Row | None,
    target: Target,
    strict: bool = True,
    detail: str = "",
) -> Row:
    """A gate. A target that is open above is "above" its lower end, strictly unless `strict` is false."""
    value, low, high = (figure[key] if figure else None for key in ("value", "low", "high"))
    strict = strict and target[1] is None
    side = None if value is None else _side(value, target, strict)
    sides = [None if end is None else _side(end, target, strict) for end in (low, high)]
    return {
        "name": name,
        "title": title,
        "unit": unit,
        "value": value,
        "low": low,
        "high": high,
        "target": list(target),
        "strict": strict,
        "passed": None if side is None else side == 0,
        "certain": sides[0] is not None and sides[0] == sides[1],
        "detail": detail,
        "advice": _unknown(name, figure) if side is None else {-1: ADVICE[name][0], 0: "", 1: ADVICE[name][1]}[side],
    }


def _side(number: float, target: Target, strict: bool) -> int:
    """-1 below the range, 0 in it, 1 above it."""
    bottom, top = target
    if bottom is not None and (number <= bottom if strict else number < bottom):
        return -1
    return 1 if top is not None and number > top else 0


def _unknown(name: str, figure: Row | None) -> str:
    if name == "judge_expert_kappa" and figure:
        return "Judge or expert call every shared step alike, so that kappa is not defined: let the expert read more."
    return UNKNOWN.get(name, NO_LABELS)
