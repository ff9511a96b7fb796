"""Tables -> figures: what the scorer is worth, as one plain dict (``report.json``); every share is in [0, 1].

Enter: questions, images, solutions, scores, labels and what the run says of itself. Leaves: `evaluate`'s report.

What counts: the questions of one split whose own row has no error (the others are counted under `counts.excluded`). A
question without solutions, or without one scored solution, counts as wrong and is counted; a solution without an answer
or without a score keeps its place among the N (`medmm_ray.stats.metrics` says what that means). A row of scores that
are not finite is a failed row of the kind `not_finite`, under `counts.errors`. Step metrics take their truth
from one source for the whole report, the first of `reference` that has labels in the split; nulls stay out. An expert's
steps weigh 1 / their chance to enter the review queue. Gates are held against truth alone, a phantom's or an expert's.
"""

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from medmm_ray.config import Config, Split, execution, identity
from medmm_ray.data.tables import Manifest, code_revision, error_kind, package_versions
from medmm_ray.stats.metrics import Aggregate
from medmm_ray.steps.evaluate.accuracy import accuracy, by_column, by_decoder
from medmm_ray.steps.evaluate.cases import (
    ARMS,
    Case,
    LogOdds,
    Row,
    make_cases,
    of_questions,
    samples,
    step_log_odds,
    without_not_finite,
)
from medmm_ray.steps.evaluate.examples import choose_examples
from medmm_ray.steps.evaluate.steps import TRUTHS, agreement, step_figures, truth_of

__all__ = ["EvaluateConfig", "environment", "evaluate", "step_entries"]


class EvaluateConfig(Config):
    split: Split = "test"
    """The split that is measured."""
    ns: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Numbers of samples N; those above what was sampled fall away."""
    aggregate: Aggregate = "min"
    """What makes a solution's reward of its steps: min (Med-PRM), last, mean (VisualPRM), product, gmean."""
    reference: tuple[str, ...] = ("phantom", "expert", "judge")
    """Label sources that step metrics may be measured against; the first that has labels in the split is. Against a
    judge the figures are shown, but no gate is held to them."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which a step is called right, in macro-F1, kappa and first errors."""
    calibration_bins: int = Field(10, ge=1)
    """Bins of equal width of the calibration curve and of the ECE (weighted by count)."""
    bootstrap_samples: int = Field(2000, ge=1)
    """Resamples of the questions for the 95 % intervals."""
    num_subsets: int = Field(128, ge=1)
    """Random subsets a question and N over which votes are averaged; all subsets where there are no more."""
    max_groups: int = Field(12, ge=0)
    """A table by question text is made where there are at most this many different texts."""
    num_examples: int = Field(6, ge=0)
    """Example cases."""
    seed: int = 0
    """Seed of subsets, bootstrap and choice of examples."""
    title: str = execution("Multimodal process reward model: report")
    """Title of the report."""


def evaluate(
    config: EvaluateConfig,
    *,
    questions: pa.Table,
    images: pa.Table,
    solutions: pa.Table,
    scores: pa.Table,
    labels: Sequence[pa.Table],
    review_queue: pa.Table | None = None,
    dataset: Row | None = None,
    steps: Sequence[Row] = (),
    environment: Row | None = None,
) -> Row:
    """The report. `labels` are label tables of any sources and splits; `review_queue` has the steps that an expert was
    asked about, with their inclusion probabilities; `steps` as `step_entries` makes them.

    What the labels are worth comes from the dataset report (`steps.audit`), over all splits; without it, nothing.

    Raises ValueError where the split has no solution at all, or a scored solution another number of scores than steps.
    """
    asked = questions.filter(pc.equal(questions["split"], config.split)).sort_by("question_id")
    excluded = Counter(error_kind(e) for e in asked["error"].to_pylist() if e)
    asked = asked.filter(pc.is_null(asked["error"]))
    solutions, scores = of_questions(solutions, asked), without_not_finite(of_questions(scores, asked))
    sampled = samples(solutions)
    log_odds = step_log_odds(scores, sampled)
    arms = [arm for arm in ARMS if arm in log_odds] + sorted(set(log_odds) - set(ARMS))
    ns = _ns(config, solutions, sampled)
    cases = make_cases(asked, sampled, log_odds, arms, config.aggregate, config.seed)
    truth = truth_of(config.reference, solutions, labels, review_queue)
    resampling = (config.bootstrap_samples, config.seed)
    groups = {
        f"by_{column}": by_column(cases, arms, ns[-1], column, config.num_subsets, *resampling)
        for column in ("difficulty", "modality", "question")
    }
    if not 1 < len(groups["by_question"]) <= config.max_groups:
        groups["by_question"] = {}
    report = {
        "title": config.title,
        "config": identity(config),
        "n": ns[-1],
        "ns": ns,
        "arms": arms,
        "reference": truth.source,
        "counts": {
            "split": config.split,
            "excluded": dict(excluded),
            **_counts(cases, arms, ns[-1]),
            "errors": _errors({"solutions": solutions, "scores": scores}, labels),
        },
        "accuracy": accuracy(cases, arms, ns, config.num_subsets, *resampling),
        "decoders": by_decoder(cases, arms, log_odds, *resampling),
        "step": {arm: step_figures(log_odds[arm], truth, config.threshold, config.calibration_bins) for arm in arms},
        "labels": dataset["balance"] if dataset else [],
        "agreement": agreement(dataset["agreement"] if dataset else []),
        "largest_text_difference": _text_difference(scores),
        **groups,
        "steps": list(steps),
        "environment": dict(environment or {}),
        "examples": choose_examples(
            cases, arms, solutions, images, scores, truth.labels, num_examples=config.num_examples, seed=config.seed
        ),
    }
    return {**report, "gates": _gates(report)}


def _ns(config: EvaluateConfig, solutions: pa.Table, sampled: Mapping[str, Sequence[Row]]) -> list[int]:
    """The N of the config up to the number of samples that was asked for, and that number where it is smaller."""
    if not any(sampled.values()):
        raise ValueError(
            f"no question of split {config.split!r} has a solution ({solutions.num_rows} rows of solutions): nothing "
            "to evaluate. Look at the error column of the solutions, or name another split (evaluate.split=...)."
        )
    requested = max(solutions["num_requested"].to_pylist())
    return sorted({n for n in config.ns if n < requested} | {min(requested, max(config.ns))})


def _counts(cases: Sequence[Case], arms: Sequence[str], n: int) -> Row:
    """What went in and what is missing; nothing leaves the figures without a number here."""
    total = sum(len(case.solution_ids) for case in cases)
    scored = {arm: sum(int((~np.isnan(case.rewards[arm])).sum()) for case in cases) for arm in arms}
    return {
        "questions": len(cases),
        "solutions": total,
        "without_answer": sum(int((case.codes < 0).sum()) for case in cases),
        "questions_without_solutions": sum(not case.solution_ids for case in cases),
        "questions_with_fewer_than_n": sum(len(case.solution_ids) < n for case in cases),
        "scored": scored,
        "unscored": {arm: total - scored[arm] for arm in arms},
        "questions_without_scores": {
            arm: sum(bool(np.isnan(case.rewards[arm]).all()) for case in cases) for arm in arms
        },
    }


def _errors(tables: Mapping[str, pa.Table], labels: Sequence[pa.Table]) -> dict[str, dict[str, int]]:
    """Failed rows by table and kind; label rows by source."""
    counts = {name: Counter(error_kind(e) for e in table["error"].to_pylist() if e) for name, table in tables.items()}
    for table in labels:
        for source, error in zip(table["source"].to_pylist(), table["error"].to_pylist(), strict=True):
            kinds = counts.setdefault(f"{source}_labels", Counter())
            if error:
                kinds[error_kind(error)] += 1
    return {name: dict(kinds) for name, kinds in counts.items()}


def _text_difference(scores: pa.Table) -> float | None:
    """The largest difference between the multimodal arm's text part and the text-only scores; None without both."""
    by_arm: list[LogOdds] = []
    for arm in ("text_only", "multimodal"):
        rows = scores.filter(pc.and_(pc.equal(scores["arm"], arm), pc.is_null(scores["error"])))
        pairs = zip(rows["solution_id"].to_pylist(), rows["text_log_odds"].to_pylist(), strict=True)
        by_arm.append({i: np.asarray(x, dtype=np.float64) for i, x in pairs})
    shared = by_arm[0].keys() & by_arm[1].keys()
    return max((float(np.abs(by_arm[0][i] - by_arm[1][i]).max()) for i in shared), default=None)


def _gates(report: Row) -> list[Row]:
    """The MedMM framework's quality gates that this run can be held to; `passed` is None where there is no figure.

    What a model is worth is measured against truth or an expert: without them it is not, whatever the judge says.
    """
    main = report["step"].get("multimodal") or {}
    measured = main if report["reference"] in TRUTHS else {}
    gain = report["accuracy"].get("gain", {}).get("best_of_n", {}).get(str(report["n"]), {})
    gates = [
        ("judge_expert_kappa", report["agreement"].get("judge_expert", {}).get("kappa"), "above", 0.8, ""),
        ("model_reference_kappa", measured.get("kappa"), "above", 0.8, _measured_on(report["reference"], main)),
        ("ece", measured.get("ece"), "below", 0.05, _measured_on(report["reference"], main)),
        ("multimodal_gain", gain.get("value"), "above", 0.05, ""),
        ("text_unchanged_without_image", report["largest_text_difference"], "below", 1e-6, ""),
    ]
    return [
        {
            "name": name,
            "value": value,
            "wanted": wanted,
            "limit": limit,
            "passed": None if value is None else value > limit if wanted == "above" else value < limit,
            "detail": detail,
        }
        for name, value, wanted, limit, detail in gates
    ]


def _measured_on(reference: str, figures: Row) -> str:
    """What a gate on step metrics rests on, or why it has no figure."""
    if reference not in TRUTHS:
        return "not measured: no expert's label and no known truth in this split"
    weighted = f", weighted; worth {figures['effective']:.0f} equal ones" if figures.get("weighted") else ""
    return f"{figures['steps']:,} steps labelled by source {reference!r}{weighted}" if figures else ""


# What the run says of itself


def step_entries(manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One entry a table or artifact, in the order given, from the manifests."""
    return [
        {"name": name, "rows": m.rows, "seconds": m.seconds, "cost": m.cost, "errors": m.errors}
        for name, m in manifests.items()
    ]


def environment() -> Row:
    """Machine, packages and code revision of this process."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "revision": code_revision(),
        "packages": package_versions(),
    }
