"""Curate: raw questions and images become clean ones, each once, with splits that share no picture.

In order: rows with errors leave, and those with identifiers of persons (`phi`); images with the same bytes become one;
near duplicates, proposed and confirmed by `near_duplicates`, then become one too; a question that occurs twice stays
once; pictures that training and test share are dealt with (`leakage`); difficulties are estimated, quotas and limits
applied. Everything that leaves is counted by its reason. Official tests stay as published (`official_test`): what
repeats or shares them leaves training.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from medmm_ray.data.records import Image, Question, from_dict
from medmm_ray.data.tables import TableError, error_kind
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.diagnostic import diagnostic_questions
from medmm_ray.steps.curate.difficulty import with_difficulties
from medmm_ray.steps.curate.leaks import benchmark_guard, without_benchmarks
from medmm_ray.steps.curate.merging import merge_images, merge_near_texts, merge_questions
from medmm_ray.steps.curate.near_duplicates import confirm, propose, thumbnails
from medmm_ray.steps.curate.phi import PhiKinds, without_phi
from medmm_ray.steps.curate.quotas import within_quotas
from medmm_ray.steps.curate.report import CurationReport, Gates, PairsByKind, curation_report
from medmm_ray.steps.curate.reviews import reviewed
from medmm_ray.steps.curate.splits import (
    drop_leaks,
    joined_groups,
    limit_questions,
    official_questions,
    resplit,
    split_images,
)

VERSION = 5  # of what a step makes: raise it when the same config makes something else
__all__ = ["CurateConfig", "Curated", "confirm", "curate", "propose", "reviewed", "thumbnails"]


@dataclass(frozen=True, kw_only=True)
class Curated:
    """The final rows, and `figures`: what was kept, and what left by reason; `notes` say what quotas lack. `report` has
    all that in the order in which it came."""

    questions: list[Question]
    images: list[Image]
    figures: dict[str, float]
    report: CurationReport
    notes: tuple[str, ...] = ()


def curate(
    questions: pa.Table,
    images: pa.Table,
    duplicates: PairsByKind,
    config: CurateConfig,
    phi: PhiKinds | None = None,
) -> Curated:
    """Raw questions and images to final ones; `duplicates` are confirmed pairs of image ids, `phi` what was found in
    the questions' texts."""
    figures: Counter[str] = Counter()
    gates = Gates(questions.num_rows)
    all_pairs = list(itertools.chain.from_iterable(duplicates.values()))
    unique_images, merged_id = merge_images(images, all_pairs, figures)
    usable = _usable(questions, figures)
    gates.passed("readable", usable)
    official_ids = official_questions(usable, config)
    diagnostic = diagnostic_questions(usable, official_ids, figures) if config.diagnostic_only else usable
    gates.passed("diagnostic", diagnostic)
    anonymous = without_phi(diagnostic, phi or {}, config, official_ids, figures)
    gates.passed("phi", anonymous)
    unique = merge_questions(anonymous, merged_id, figures, official_ids)
    gates.passed("once", unique)
    unique = merge_near_texts(unique, config, figures, official_ids)
    gates.passed("near_texts", unique)
    unique = without_benchmarks(unique, benchmark_guard(unique, config, official_ids), figures)
    gates.passed("benchmarks", unique)
    groups = joined_groups(unique)
    if config.leakage == "resplit":
        unique = resplit(unique, groups, config, official_ids)
    without_leaks = drop_leaks(unique, groups, figures)
    gates.passed("leaks", without_leaks)
    if config.difficulty == "estimate":
        without_leaks = with_difficulties(without_leaks, figures)
    composed, notes = within_quotas(without_leaks, unique_images, config, official_ids, figures)
    gates.passed("quotas", composed)
    limited = limit_questions(composed, config, figures, official_ids)
    gates.passed("limits", limited)
    final_questions = [replace(question, group=groups[question.question_id]) for question in limited]
    final_images = split_images(final_questions, unique_images, figures)
    _count_splits(final_questions, final_images, official_ids, figures)
    # An empty table would only fail in a later step, where nothing says why.
    if not final_questions:
        raise TableError(
            f"curate leaves none of {questions.num_rows} questions ({_reasons(figures)}); see raw_questions.error"
        )
    sorted_figures = {}
    for name in sorted(figures):
        sorted_figures[name] = float(figures[name])
    report = curation_report(
        final_questions,
        gates.gates,
        sorted_figures,
        notes,
        merged_id,
        images,
        duplicates,
        phi or {},
        config,
    )
    return Curated(
        questions=final_questions,
        images=final_images,
        figures=sorted_figures,
        report=report,
        notes=tuple(notes),
    )


def _count_splits(
    questions: Sequence[Question],
    images: Sequence[Image],
    official_ids: Collection[str],
    figures: Counter[str],
) -> None:
    """Count what stays by split, and official tests by data set."""
    split_sizes = Counter(question.split for question in questions)
    image_split_sizes = Counter(image.split for image in images)
    official = Counter(question.dataset for question in questions if question.question_id in official_ids)
    for dataset, count in sorted(official.items()):
        figures[f"official_test_{dataset}"] = count
    for split in ("train", "test"):
        figures[f"{split}_questions"] = split_sizes[split]
        figures[f"{split}_images"] = image_split_sizes[split]


def _reasons(figures: Mapping[str, int]) -> str:
    """Why rows left, in one line: what is 0 explains nothing."""
    reasons = []
    for name in sorted(figures):
        if figures[name]:
            reasons.append(f"{name} {figures[name]}")
    return ", ".join(reasons)


def _usable(questions: pa.Table, figures: Counter[str]) -> list[Question]:
    """The questions without an error; the others are counted."""
    usable = []
    for row in questions.to_pylist():
        if row["error"]:
            kind = error_kind(row["error"])
            figures[f"questions_error_{kind}"] += 1
        else:
            usable.append(from_dict(Question, row))
    return usable
