"""Quotas: so many questions of each split, modality and difficulty; what a quota lacks, and what would fill it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from medmm_ray.config import digest
from medmm_ray.data.datasets import data_sets
from medmm_ray.data.records import Image, Question
from medmm_ray.steps.curate.config import CurateConfig

ANY = ""
"""The difficulty of a quota that takes questions of every difficulty."""


@dataclass(frozen=True)
class Quota:
    """How many questions of a split, a modality and a difficulty (or `ANY`) are taken."""

    split: str
    modality: str
    difficulty: str
    count: int

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.split, self.modality, self.difficulty)))

    def takes(self, question: Question) -> bool:
        """Whether a question is one of those that are counted."""
        of_modality = (question.split, question.modality) == (self.split, self.modality)
        return of_modality and self.difficulty in (ANY, question.difficulty)


def quotas_of(config: CurateConfig) -> Iterator[Quota]:
    """The quotas of a recipe, in its order."""
    for split, by_modality in config.quotas.items():
        for modality, counts in by_modality.items():
            if isinstance(counts, int):
                yield Quota(
                    split,
                    modality,
                    ANY,
                    counts,
                )
                continue
            for difficulty, count in counts.items():
                yield Quota(
                    split,
                    modality,
                    difficulty,
                    count,
                )


def within_quotas(
    questions: Sequence[Question],
    images: Mapping[str, Image],
    config: CurateConfig,
    official_ids: Collection[str],
    figures: Counter[str],
) -> tuple[list[Question], list[str]]:
    """The questions that quotas take, chosen by a hash of their ids, and a note for each quota that is not filled.

    Splits without a quota, and official tests, stay as they are.
    """
    quotas = list(quotas_of(config))
    counted = {quota.split for quota in quotas}
    taken: list[Question] = []
    open_to_quotas: list[Question] = []
    for question in questions:
        # A quota of training says nothing of the test.
        is_free = question.split not in counted or question.question_id in official_ids
        (taken if is_free else open_to_quotas).append(question)
    # A place in the choice that stays when other questions come or leave.
    open_to_quotas.sort(key=lambda q: digest("quota", config.seed, q.question_id))
    notes = []
    for quota in quotas:
        # In the order of the hash: the first are the choice.
        fitting = list(filter(quota.takes, open_to_quotas))
        taken += fitting[: quota.count]
        lacking = quota.count - len(fitting)
        if lacking > 0:
            figures[f"quota_lacks_{quota.name}"] = lacking
            notes.append(
                _note(
                    quota,
                    len(fitting),
                    questions,
                    images,
                )
            )
    figures["questions_over_quota"] = len(questions) - len(taken)
    return sorted(taken, key=lambda q: q.question_id), notes


def _note(
    quota: Quota,
    number: int,
    questions: Sequence[Question],
    images: Mapping[str, Image],
) -> str:
    """What a quota lacks, and what would fill it."""
    remedies = list(_remedies(quota, questions, images))
    remedy = "; ".join(remedies) or "no declared data set has such questions: add your own (docs/data.md)"
    return f"quota {quota.name}: {number:,} of {quota.count:,} questions, {quota.count - number:,} lacking. {remedy}"


def _remedies(
    quota: Quota,
    questions: Sequence[Question],
    images: Mapping[str, Image],
) -> Iterator[str]:
    of_modality = [q for q in questions if (q.split, q.modality) == (quota.split, quota.modality)]
    if quota.difficulty:
        unrated = sum(not q.difficulty for q in of_modality)
        if unrated:
            yield f"{unrated:,} questions of this modality have no difficulty (curate.difficulty=estimate)"
        by_difficulty = Counter(q.difficulty for q in of_modality if q.difficulty not in ("", quota.difficulty))
        if by_difficulty:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(by_difficulty.items()))
            yield f"others of this modality: {counts}"
    # Pictures that nobody asks of are what write_questions is for.
    asked = {image_id for question in questions for image_id in question.image_ids}
    num_unasked = sum(image.modality == quota.modality and key not in asked for key, image in images.items())
    if num_unasked:
        yield f"write_questions can write some for {num_unasked:,} pictures without one (curate.written)"
    present = {question.dataset for question in questions}
    if names := list(_data_sets(quota, present)):
        yield f"data sets that have some (ingest.sources): {', '.join(names)}"


def _data_sets(quota: Quota, present: Collection[str]) -> Iterator[str]:
    """Declared data sets of the quota's modality that are not in the run, with what they bring, the largest first."""
    sizes: defaultdict[str, int] = defaultdict(int)
    for name, data_set in data_sets().items():
        fits = data_set.modality == quota.modality and data_set.brings != "steps" and name not in present
        if fits and data_set.counts.get(quota.split):
            sizes[name] = data_set.counts[quota.split]
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        what = "pictures" if data_sets()[name].brings == "pictures" else "questions"
        yield f"{name} ({sizes[name]:,} {what})"
