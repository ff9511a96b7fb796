"""Tables -> figures: what the scorer is worth, as one plain dict (``report.json``); every share is in [0, 1].

Enter: questions, images, solutions, scores, labels and what the run says of itself. Leaves: `evaluate`'s report.

What counts: the questions of one split whose own row has no error (the others are counted under `counts.excluded`). A
question without solutions, or without one scored solution, counts as wrong and is counted; a solution without an answer
or without a score keeps its place among the N (`medmm_ray.stats.decoders` says what that means). A row of scores that
are not finite is a failed row of the kind `not_finite`, under `counts.errors`. Step metrics take their truth
from one source for the whole report, the first of `reference` that has labels in the split; nulls stay out. An expert's
steps weigh 1 / their chance to enter the review queue. Gates are held against truth alone, a phantom's or an expert's.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from medmm_ray.config import Config, JsonObject, Split, execution, identity
from medmm_ray.data.tables import code_revision, error_kind, package_versions
from medmm_ray.stats.decoders import Aggregate
from medmm_ray.stats.grouped_stats import Resampling
from medmm_ray.steps.evaluate.accuracy import accuracy, accuracy_by_column, accuracy_by_decoder
from medmm_ray.steps.evaluate.examples import choose_examples
from medmm_ray.steps.evaluate.scored_questions import (
    ARMS,
    LogOdds,
    Sample,
    ScoredQuestion,
    of_questions,
    samples_by_question,
    scored_questions,
    step_log_odds,
    without_not_finite,
)
from medmm_ray.steps.evaluate.steps import TRUTHS, agreement, reference_labels, step_figures

VERSION = 4  # of what a step makes: raise it when the same config makes something else
__all__ = ["EvaluateConfig", "environment", "evaluate"]


class EvaluateConfig(Config):
    """What is measured, against which labels, and how finely."""

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
    """Example questions that are shown with their solutions."""
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
    dataset: JsonObject | None = None,
    steps: Sequence[JsonObject] = (),
    environment: JsonObject | None = None,
) -> JsonObject:
    """The report. `labels` are label tables of any sources and splits; `review_queue` has the steps that an expert was
    asked about, with their inclusion probabilities; `steps` are {name, rows, seconds} of the run's steps.

    What the labels are worth comes from the dataset report (`steps.audit`), over all splits; without it, nothing.

    Raises ValueError where the split has no solution at all, or a scored solution another number of scores than steps.
    """
    of_split = questions.filter(pc.equal(questions["split"], config.split)).sort_by("question_id")
    usable = of_split.filter(pc.is_null(of_split["error"]))
    solutions = of_questions(solutions, usable)
    scores = without_not_finite(of_questions(scores, usable))
    samples = samples_by_question(solutions)
    log_odds = step_log_odds(scores, samples)
    arms = _in_order(log_odds)
    ns = _ns(config, solutions, samples)
    scored = scored_questions(usable, samples, log_odds, arms, config.aggregate, config.seed)
    reference = reference_labels(config.reference, solutions, labels, review_queue)
    # One seed for all figures: they rest on the same resamples, so that they may be compared.
    resampling = Resampling(config.bootstrap_samples, config.seed)
    step_metrics = {}
    for arm in arms:
        step_metrics[arm] = step_figures(log_odds[arm], reference, config.threshold, config.calibration_bins)
    counts = {
        "split": config.split,
        "excluded": _error_counts(of_split),
        **_counts(scored, arms, ns[-1]),
        "errors": _errors({"solutions": solutions, "scores": scores}, labels),
    }
    report = {
        "title": config.title,
        "config": identity(config),
        "n": ns[-1],
        "ns": ns,
        "arms": arms,
        "reference": reference.source,
        "counts": counts,
        "accuracy": accuracy(scored, arms, ns, config.num_subsets, resampling),
        "decoders": accuracy_by_decoder(scored, arms, log_odds, resampling),
        "step": step_metrics,
        "labels": dataset["balance"] if dataset else [],
        "agreement": agreement(dataset["agreement"] if dataset else []),
        "largest_text_difference": _largest_text_difference(scores),
        **_accuracy_by_group(config, scored, arms, ns[-1], resampling),
        "steps": list(steps),
        "environment": dict(environment or {}),
        "examples": choose_examples(
            scored,
            arms,
            solutions,
            images,
            scores,
            reference.labels,
            num_examples=config.num_examples,
            seed=config.seed,
        ),
    }
    return {**report, "gates": list(map(asdict, _gates(report)))}


def _in_order(arms: Iterable[str]) -> list[str]:
    """The arms in the order of `ARMS`, then those of other names."""
    present = set(arms)
    ordered = [arm for arm in ARMS if arm in present]
    return ordered + sorted(present.difference(ARMS))


def _accuracy_by_group(
    config: EvaluateConfig, scored: Sequence[ScoredQuestion], arms: Sequence[str], n: int, resampling: Resampling
) -> dict[str, JsonObject]:
    """The accuracy at N by difficulty, modality and, where the texts are few, by question text."""
    tables = {}
    for column in ("difficulty", "modality", "question"):
        tables[f"by_{column}"] = accuracy_by_column(scored, arms, n, column, config.num_subsets, resampling)
    # Where every question has a text of its own, a table of them would be the list of questions.
    if not 1 < len(tables["by_question"]) <= config.max_groups:
        tables["by_question"] = {}
    return tables


def _ns(config: EvaluateConfig, solutions: pa.Table, samples: Mapping[str, Sequence[Sample]]) -> list[int]:
    """The N of the config up to the number of samples that was asked for, and that number where it is smaller."""
    if not any(samples.values()):
        raise ValueError(
            f"no question of split {config.split!r} has a solution ({solutions.num_rows} rows of solutions): nothing "
            "to evaluate. Look at the error column of the solutions, or name another split (evaluate.split=...)."
        )
    # What was asked for, not what came: a question with fewer samples keeps its place among the N.
    requested = max(solutions["num_requested"].to_pylist())
    largest = min(requested, max(config.ns))
    smaller = {n for n in config.ns if n < requested}
    return sorted(smaller | {largest})


def _counts(scored: Sequence[ScoredQuestion], arms: Sequence[str], n: int) -> JsonObject:
    """What went in and what is missing; nothing leaves the figures without a number here."""
    num_samples = without_answer = without_solutions = with_fewer = 0
    for question in scored:
        num_samples += question.num_samples
        without_answer += int((question.codes < 0).sum())
        without_solutions += question.num_samples == 0
        with_fewer += question.num_samples < n
    num_scored: dict[str, int] = {}
    questions_without_scores: dict[str, int] = {}
    unscored: dict[str, int] = {}
    for arm in arms:
        num_scored[arm] = questions_without_scores[arm] = 0
        for question in scored:
            is_scored = ~np.isnan(question.rewards[arm])
            num_scored[arm] += int(is_scored.sum())
            # A question without samples is among them.
            questions_without_scores[arm] += not is_scored.any()
        unscored[arm] = num_samples - num_scored[arm]
    return {
        "questions": len(scored),
        "solutions": num_samples,
        "without_answer": without_answer,
        "questions_without_solutions": without_solutions,
        "questions_with_fewer_than_n": with_fewer,
        "scored": num_scored,
        "unscored": unscored,
        "questions_without_scores": questions_without_scores,
    }


def _errors(tables: Mapping[str, pa.Table], labels: Sequence[pa.Table]) -> dict[str, dict[str, int]]:
    """Failed rows by table and kind; label rows by source."""
    counts: dict[str, dict[str, int]] = {}
    for name, table in tables.items():
        counts[name] = _error_counts(table)
    for table in labels:
        sources = table["source"].to_pylist()
        errors = table["error"].to_pylist()
        for source, error in zip(sources, errors, strict=True):
            # A source without a failed row is there, with nothing counted.
            kinds = counts.setdefault(f"{source}_labels", {})
            if error:
                kind = error_kind(error)
                kinds[kind] = kinds.get(kind, 0) + 1
    return counts


def _error_counts(table: pa.Table) -> dict[str, int]:
    """The failed rows of a table by the kind of their error."""
    errors = filter(None, table["error"].to_pylist())
    return dict(Counter(map(error_kind, errors)))


def _largest_text_difference(scores: pa.Table) -> float | None:
    """The largest difference between the multimodal arm's text part and the text-only scores; None without both."""
    text_only = _text_log_odds(scores, "text_only")
    multimodal = _text_log_odds(scores, "multimodal")
    differences = []
    for solution_id in text_only.keys() & multimodal.keys():
        difference = np.abs(text_only[solution_id] - multimodal[solution_id])
        differences.append(float(difference.max()))
    return max(differences, default=None)


def _text_log_odds(scores: pa.Table, arm: str) -> LogOdds:
    """The text part of each step's log-odds, of one arm's rows without an error."""
    usable = pc.and_(pc.equal(scores["arm"], arm), pc.is_null(scores["error"]))
    rows = scores.filter(usable)
    solution_ids = rows["solution_id"].to_pylist()
    texts = rows["text_log_odds"].to_pylist()
    by_solution = {}
    for solution_id, text in zip(solution_ids, texts, strict=True):
        by_solution[solution_id] = np.asarray(text, dtype=np.float64)
    return by_solution


# Gates


@dataclass(frozen=True)
class Gate:
    """A figure beside the limit that it must lie above or below; `passed` is None where there is no figure."""

    name: str
    value: float | None
    wanted: Literal["above", "below"]
    limit: float
    passed: bool | None
    detail: str


def _gate(name: str, value: float | None, side: Literal["above", "below"], limit: float, detail: str = "") -> Gate:
    passed = None
    if value is not None and side == "above":
        passed = value > limit
    elif value is not None:
        passed = value < limit
    return Gate(name, value, side, limit, passed, detail)


def _gates(report: JsonObject) -> list[Gate]:
    """The MedMM framework's quality gates that this run can be held to.

    What a model is worth is measured against truth or an expert: without them it is not, whatever the judge says.
    """
    # Labels of a phantom's truth or an expert may be missing, and an arm too: a gate has no figure then.
    reference = report["reference"]
    step_metrics = report["step"].get("multimodal") or {}
    # A judge's labels are themselves to be measured: figures against them are shown, and held to nothing.
    measured = step_metrics if reference in TRUTHS else {}
    basis = _measured_on(reference, step_metrics)
    judge_expert = report["agreement"].get("judge_expert", {})
    gains = report["accuracy"].get("gain", {}).get("best_of_n", {})
    gain = gains.get(str(report["n"]), {})
    return [
        _gate("judge_expert_kappa", judge_expert.get("kappa"), "above", 0.8),
        _gate("model_reference_kappa", measured.get("kappa"), "above", 0.8, basis),
        _gate("ece", measured.get("ece"), "below", 0.05, basis),
        _gate("multimodal_gain", gain.get("value"), "above", 0.05),
        _gate("text_unchanged_without_image", report["largest_text_difference"], "below", 1e-6),
    ]


def _measured_on(reference: str, figures: JsonObject) -> str:
    """What a gate on step metrics rests on, or why it has no figure."""
    if reference not in TRUTHS:
        return "not measured: no expert's label and no known truth in this split"
    if not figures:
        return ""
    weighted = f", weighted; worth {figures['effective']:.0f} equal ones" if figures["weighted"] else ""
    return f"{figures['steps']:,} steps labelled by source {reference!r}{weighted}"


def environment() -> JsonObject:
    """Machine, packages and code revision of this process."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "revision": code_revision(),
        "packages": package_versions(),
    }
