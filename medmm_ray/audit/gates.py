"""The quality gates: each figure beside its target, whether it is met, and what to do where it is not.

A gate is {name, title, unit, value, low, high, target, wanted, passed, certain, detail, advice}. `target` is the range
of good values [low, high], an end None where it is open; `passed` is None where there is no figure; `certain` says that
the whole interval lies on the same side as the figure. A figure on the edge of a range is inside; "above" is strict.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmm_ray.audit import AuditConfig

Row = dict[str, Any]
Target = tuple[float | None, float | None]

ADVICE = {
    "judge_expert_kappa": (
        "Read the pairs where judge and expert differ (review_queue, expert_labels). One kind of step or one modality "
        "stands out: mend the judge's prompt, or show it documents and the image. None does: take another judge, or "
        "label by Monte Carlo and train on policy consensus."
    ),
    "positive_share": (
        "Above: the policy is too good for these questions, add harder ones or sample hotter (sample.temperature). "
        "Below: the policy is too weak or the judge too strict; look at kappa by answer first."
    ),
    "easy_positive": (
        "Either easy questions are not easy for this policy (look at its accuracy on them), or the judge "
        "calls right steps wrong: read some wrong steps of right answers among them."
    ),
    "hard_positive": (
        "Above: the hard questions are not hard for this policy. Below: it learns little from them; use a "
        "stronger policy or more documents in its prompt."
    ),
    "mean_steps": (
        "The policy's prompt and its demonstrations set the length of a step; sample.min_steps and sample.max_steps "
        "say what is kept, and at most 9 steps cannot average above 9."
    ),
    "modalities": "Add a source that has the missing ones (ingest.source), or name those you want in audit.modalities.",
    "leakage": "Run curate again with leakage: resplit, and retrieve after it; figures on this test split are void.",
    "cost": "Lower sample.num_samples_train, judge fewer solutions, or let Monte Carlo run on fewer steps (max_share).",
}
UNKNOWN = {
    "judge_expert_kappa": "No step has both a judge's and an expert's label yet: let an expert read the review queue.",
    "mean_steps": "No solution is there yet: run sample.",
    "cost": "No budget is set: audit.max_cost_usd.",
}
NO_LABELS = "No label of a right or a wrong step is there yet: run judge."


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
        _gate("cost", "Cost", "dollars", _exact(report["cost"]["total"]) if config.max_cost_usd is not None else None,
              (None, config.max_cost_usd)),
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
    passed = None if value is None else _side(value, target, strict) == 0
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
        "passed": passed,
        "certain": sides[0] is not None and sides[0] == sides[1],
        "detail": detail,
        "advice": "" if passed else ADVICE[name] if passed is False else _unknown(name, figure),
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
