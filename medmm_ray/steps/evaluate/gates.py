"""The MedMM framework's quality gates of a scorer, and their form in ``report.json``.

A gate there is what it is called, its figure, the limit, and whether the figure lies on the wanted side of it.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from medmm_ray.config import JsonObject
from medmm_ray.stats.gates import Gate, Target, Unit, make_gate
from medmm_ray.stats.grouped_stats import Figure
from medmm_ray.steps.evaluate.accuracy import AccuracyOverN
from medmm_ray.steps.evaluate.steps import TRUTHS, AgreementInShort, StepFigures


@dataclass(frozen=True)
class _Kind:
    """How a gate is called and measured, and the limit that it sets."""

    title: str
    unit: Unit
    target: Target


KINDS = {
    "judge_expert_kappa": _Kind("Judge agrees with the expert (κ)", "kappa", (0.8, None)),
    "model_reference_kappa": _Kind(
        "Model agrees with truth or expert, step by step (κ)",
        "kappa",
        (0.8, None),
    ),
    "ece": _Kind("Expected calibration error, multimodal", "share", (None, 0.05)),
    "multimodal_gain": _Kind("Gain of the image at best-of-N (fraction)", "share", (0.05, None)),
    "text_unchanged_without_image": _Kind(
        "Text part against text-only scores (largest difference)",
        "log_odds",
        (None, 1e-6),
    ),
}


def gates_of(
    n: int,
    reference: str,
    accuracy: AccuracyOverN,
    step_figures: StepFigures | None,
    judge_expert: AgreementInShort | None,
    largest_text_difference: float | None,
) -> list[Gate]:
    """The gates that this run can be held to; `step_figures` are those of the multimodal arm.

    What a model is worth is measured against truth or an expert: without them it is not, whatever the judge says.
    """
    # A judge's labels are themselves to be measured: figures against them are shown, and held to nothing.
    measured = step_figures if reference in TRUTHS else None
    basis = _measured_on(reference, step_figures)
    # Labels of a phantom's truth or an expert may be missing, and an arm too: a gate has no figure then.
    gain = accuracy.gain.best_of_n[str(n)].value if accuracy.gain else None
    return [
        _gate("judge_expert_kappa", judge_expert.kappa if judge_expert else None),
        _gate("model_reference_kappa", measured.kappa if measured else None, basis),
        _gate("ece", measured.ece if measured else None, basis),
        _gate("multimodal_gain", gain),
        _gate("text_unchanged_without_image", largest_text_difference),
    ]


def _gate(name: str, value: float | None, detail: str = "", target: Target | None = None) -> Gate:
    kind = KINDS[name]
    # Held against the figure alone: its interval is shown elsewhere, or not known.
    figure = Figure(value, None, None)
    return make_gate(name, kind.title, kind.unit, figure, target or kind.target, strict=True, detail=detail)


def _measured_on(reference: str, figures: StepFigures | None) -> str:
    """What a gate on step metrics rests on, or why it has no figure."""
    if reference not in TRUTHS:
        return "not measured: no expert's label and no known truth in this split"
    if figures is None:
        return ""
    weighted = f", weighted; worth {figures.effective:.0f} equal ones" if figures.weighted else ""
    return f"{figures.steps:,} steps labelled by source {reference!r}{weighted}"


# In report.json


def limit_of(gate: Gate) -> tuple[str, float | None]:
    """Whether the figure has to lie above or below the gate's limit, and the limit."""
    low, high = gate.target
    return ("below", high) if low is None else ("above", low)


def _to_fields(gate: Gate) -> JsonObject:
    side, limit = limit_of(gate)
    return {
        "name": gate.name,
        "value": gate.value,
        "wanted": side,
        "limit": limit,
        "passed": gate.passed,
        "detail": gate.detail,
    }


def _from_fields(fields: Any) -> Gate:
    limit = fields["limit"]
    target = (limit, None) if fields["wanted"] == "above" else (None, limit)
    return _gate(fields["name"], fields["value"], fields["detail"], target)


LimitGate = Annotated[Gate, PlainSerializer(_to_fields), BeforeValidator(_from_fields)]
"""A gate that is written as its limit alone."""
