"""The quality gates: each figure beside its target, whether it is met, and what to do where it is not.

A figure on the edge of a target's range is inside; "above" is strict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from medmm_ray.stats.gates import Gate, Target, Unit, figure_text, make_gate, target_text
from medmm_ray.stats.grouped_stats import Figure, GroupedStats
from medmm_ray.steps.audit.config import AuditConfig
from medmm_ray.steps.audit.leakage import LeakageCheck
from medmm_ray.steps.audit.report import AuditReport
from medmm_ray.steps.audit.sampling import ModalityCounts, StepCounts

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
SOURCES = "Add a source that has the missing ones (ingest.sources), or name those that you want in audit.modalities."
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


def require(gates: Sequence[Gate]) -> None:
    """Raise `GateError`, with the figures, where a gate fails; one without a figure does not."""
    faults = []
    for gate in gates:
        # None: without a figure a gate is neither met nor missed.
        if gate.passed is False:
            faults.append(f"{gate.title} {figure_text(gate.value, gate.unit)}, wanted {target_text(gate)}")
    if not faults:
        return
    raise GateError(
        f"{len(faults)} of {len(gates)} quality gates fail: {'; '.join(faults)}. dataset_report.html, in the "
        "run's folder, says what to do; audit.gates=report goes on all the same"
    )


def gates_of(config: AuditConfig, report: AuditReport) -> list[Gate]:
    """All gates of the report's figures, in the order in which they are worth reading."""
    # Of one source alone: shares of judge and Monte Carlo are of different things.
    balance = report.speaking_balance
    shares: GroupedStats = balance.share if balance else {}
    overall = shares.get("all", {}).get("all")
    by_difficulty = shares.get("difficulty", {})
    easy, hard = by_difficulty.get("easy"), by_difficulty.get("hard")
    return [
        _kappa_gate(config, report),
        _gate("positive_share", "Right steps", "share", overall, config.positive_share),
        _gate("easy_positive", "Right steps, easy questions", "share", easy, (config.min_easy_positive, None)),
        _gate("hard_positive", "Right steps, hard questions", "share", hard, config.hard_positive),
        _step_gate(config, report.steps),
        _modality_gate(config, report.coverage.modalities),
        _leakage_gate(report.leakage),
        _cost_gate(config, report.cost.total),
    ]


def _kappa_gate(config: AuditConfig, report: AuditReport) -> Gate:
    name, title = "judge_expert_kappa", "Judge agrees with the expert"
    target = (config.min_kappa, None)
    pair = report.judge_expert
    if pair is None:
        return _gate(name, title, "kappa", None, target)
    figure = pair.overall_kappa
    detail = f"{figure.count:,} steps of {figure.questions:,} questions"
    if pair.weighted:
        # The queue draws disputed steps more often: many steps of small weight tell less than as many equal ones.
        detail += f", weighted; worth {figure.effective:.0f} equal ones"
    return _gate(name, title, "kappa", figure, target, detail=detail)


def _step_gate(config: AuditConfig, steps: StepCounts) -> Gate:
    detail = ""
    if steps.solutions:
        fewest, most = config.usual_steps
        few = 100 * steps.few / steps.solutions
        many = 100 * steps.many / steps.solutions
        detail = f"fewer than {fewest}: {few:.1f} %, more than {most}: {many:.1f} % of the solutions"
    return _gate("mean_steps", "Steps a solution, mean", "steps", steps.mean, config.mean_steps, detail=detail)


def _modality_gate(config: AuditConfig, counts: Mapping[str, ModalityCounts]) -> Gate:
    present: list[str] = []
    absent: list[str] = []
    for modality in config.modalities:
        # A modality is listed only where it has a question.
        (present if modality in counts else absent).append(modality)
    return _gate(
        "modalities",
        "Modalities present",
        "count",
        _exact(len(present)),
        (len(config.modalities), None),
        strict=False,
        detail=f"missing: {', '.join(absent)}" if absent else ", ".join(present),
    )


def _leakage_gate(checks: Sequence[LeakageCheck]) -> Gate:
    total = 0
    leaks = []
    for check in checks:
        if check.count:
            total += check.count
            leaks.append(f"{check.name.replace('_', ' ')} {check.count}")
    return _gate("leakage", "Shared between splits", "count", _exact(total), (None, 0), detail=", ".join(leaks))


def _cost_gate(config: AuditConfig, total: float) -> Gate:
    return _gate(
        "cost",
        "Paid to APIs and readers",
        "dollars",
        _exact(total) if config.max_cost_usd is not None else None,
        (None, config.max_cost_usd),
        detail="time on own GPUs is not in it",
    )


def _exact(value: float) -> Figure:
    """A figure that was counted, not estimated: its interval is itself."""
    return Figure(value, value, value)


def _gate(
    name: str,
    title: str,
    unit: Unit,
    figure: Figure | None,
    target: Target,
    strict: bool = True,
    detail: str = "",
) -> Gate:
    """A gate with its advice. `strict`: of a target that is open above, a figure on the lower end fails."""
    # Of a range, and of a limit above, the ends are inside.
    is_strict = strict and target[1] is None
    gate = make_gate(name, title, unit, figure, target, strict=is_strict, detail=detail)
    return replace(gate, advice=_advice(gate, has_figure=figure is not None))


def _advice(gate: Gate, has_figure: bool) -> str:
    """What to do where the figure lies outside its range, or where it has no value."""
    if gate.side is None:
        # Kappa has no value where either rater uses one class alone, however many steps they share.
        if gate.name == "judge_expert_kappa" and has_figure:
            return (
                "Judge or expert call every shared step alike, so that kappa is not defined: let the expert read more."
            )
        return UNKNOWN.get(gate.name, NO_LABELS)
    below, above = ADVICE[gate.name]
    return {-1: below, 0: "", 1: above}[gate.side]
