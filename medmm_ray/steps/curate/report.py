"""What curation did: how many questions each gate let through, which pictures became one, what the set consists of.

Enters: a `Curated` and the pairs of images that were taken for one picture. Leaves: a `CurationReport`, for a page and
for ``curation_report.json``; it has ids and kinds of identifiers, and no word of a question.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from medmm_ray.config import JsonObject, digest, identity
from medmm_ray.data.records import Question
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.phi import PhiKinds
from medmm_ray.steps.curate.quotas import quotas_of

EXAMPLES = 6
"""Pairs of pictures of each kind that the page shows."""
PairsByKind = Mapping[str, Sequence[tuple[str, str]]]
"""Pairs of image ids by what makes them one: near_duplicate, altered."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate, the questions that came to it, those that it let through, and these by split."""

    name: str
    before: int
    after: int
    splits: dict[str, int]


class Gates:
    """Counts questions from gate to gate."""

    def __init__(self, num_read: int) -> None:
        self.gates: list[Gate] = []
        self._num_before = num_read

    def passed(self, name: str, questions: Sequence[Question]) -> None:
        """Note what a gate let through."""
        splits = Counter(question.split for question in questions)
        self.gates.append(
            Gate(name=name, before=self._num_before, after=len(questions), splits=dict(sorted(splits.items())))
        )
        self._num_before = len(questions)


@dataclass(frozen=True, kw_only=True)
class PicturePair:
    """A picture that left as another one stands for it; both URIs."""

    kind: str
    kept_id: str
    kept_uri: str
    removed_id: str
    removed_uri: str


@dataclass(frozen=True, kw_only=True)
class Portion:
    """The questions of one split, data set, modality and difficulty."""

    split: str
    dataset: str
    modality: str
    difficulty: str
    questions: int


@dataclass(frozen=True, kw_only=True)
class QuotaFill:
    """A quota, and how many questions it found."""

    name: str
    count: int
    filled: int


@dataclass(frozen=True, kw_only=True)
class FlaggedQuestion:
    """A question with identifiers: their kinds alone."""

    question_id: str
    kinds: list[str]
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """What `curate` did with what it read."""

    config: JsonObject
    gates: list[Gate]
    images_read: int
    images_unreadable: int
    images_same_bytes: int
    images_merged: int
    images_kept: int
    num_pairs: dict[str, int]
    """Pairs of pictures taken for one, by kind."""
    pairs: list[PicturePair]
    portions: list[Portion]
    quotas: list[QuotaFill]
    notes: list[str]
    phi: list[FlaggedQuestion]
    figures: dict[str, float]


def curation_report(
    questions: Sequence[Question],
    gates: Sequence[Gate],
    figures: Mapping[str, float],
    notes: Sequence[str],
    merged_id: Mapping[str, str],
    images: pa.Table,
    pairs: PairsByKind,
    phi: PhiKinds,
    config: CurateConfig,
) -> CurationReport:
    """The report of the final `questions`; `images` are rows of raw_images, `merged_id` names what stands for each."""
    kept_ids = {question.question_id for question in questions}
    flagged = []
    for question_id, kinds in sorted(phi.items()):
        flagged.append(FlaggedQuestion(question_id=question_id, kinds=list(kinds), is_kept=question_id in kept_ids))
    num_unreadable = sum(int(count) for name, count in figures.items() if name.startswith("images_error_"))
    pairs = _each_once(pairs)
    num_pairs = {kind: len(of_kind) for kind, of_kind in pairs.items()}
    return CurationReport(
        config=identity(config),
        gates=list(gates),
        images_read=images.num_rows,
        images_unreadable=num_unreadable,
        images_same_bytes=int(figures.get("images_same_bytes", 0)),
        images_merged=int(figures.get("images_near_duplicate", 0)),
        images_kept=len(set(merged_id.values())),
        num_pairs=num_pairs,
        pairs=_examples(pairs, merged_id, images),
        portions=_portions(questions),
        quotas=_quotas(config, figures),
        notes=list(notes),
        phi=flagged,
        figures=dict(figures),
    )


def _each_once(pairs: PairsByKind) -> PairsByKind:
    """The pairs without those that an earlier kind has: a recompressed copy is also found as an altered one."""
    earlier: set[tuple[str, str]] = set()
    each_once = {}
    for kind, of_kind in pairs.items():
        new_pairs = {(min(pair), max(pair)) for pair in of_kind} - earlier
        each_once[kind] = sorted(new_pairs)
        earlier |= new_pairs
    return each_once


def _examples(pairs: PairsByKind, merged_id: Mapping[str, str], images: pa.Table) -> list[PicturePair]:
    """Pairs to show, of each kind some: those with the lowest hashes of their ids, so that no table's order counts."""
    uris = dict(zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True))
    examples = []
    for kind, of_kind in pairs.items():
        removed_ids: dict[str, None] = {}
        for pair in sorted(of_kind, key=lambda pair: digest("example", *pair)):
            removed_ids.update(dict.fromkeys(image_id for image_id in pair if merged_id[image_id] != image_id))
        for removed_id in list(removed_ids)[:EXAMPLES]:
            kept_id = merged_id[removed_id]
            examples.append(
                PicturePair(
                    kind=kind,
                    kept_id=kept_id,
                    kept_uri=uris[kept_id],
                    removed_id=removed_id,
                    removed_uri=uris[removed_id],
                )
            )
    return examples


def _portions(questions: Sequence[Question]) -> list[Portion]:
    counts = Counter((q.split, q.dataset or q.source, q.modality, q.difficulty) for q in questions)
    portions = []
    for (split, dataset, modality, difficulty), number in sorted(counts.items()):
        portions.append(
            Portion(split=split, dataset=dataset, modality=modality, difficulty=difficulty, questions=number)
        )
    return portions


def _quotas(config: CurateConfig, figures: Mapping[str, float]) -> list[QuotaFill]:
    fills = []
    for quota in quotas_of(config):
        lacking = int(figures.get(f"quota_lacks_{quota.name}", 0))
        fills.append(QuotaFill(name=quota.name, count=quota.count, filled=quota.count - lacking))
    return fills
