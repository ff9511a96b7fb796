"""The expert's queue, and the expert's verdicts.

Enters: solutions, their questions and images, the labels so far. Leaves: `ReviewItem` rows, a sample of all steps in
strata of difficulty x modality x disagreement plus a random stratum, each with its inclusion probability; and labels of
source "expert" for the steps of the queue (the other steps empty). Where the source knows its pictures the expert is
the truth, and whole solutions of `truth_splits` get it for measuring; elsewhere readers are, through the review page.

The queue is drawn over the whole table at once, on columns: a million steps take 0.7 s.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medmm_ray.config import Config, Splits, execution
from medmm_ray.data.records import Labels, ReviewItem, StepLabel, to_arrow_lists
from medmm_ray.data.sources import WITH_TRUTH, DrawnPicture, load_with_truth
from medmm_ray.data.tables import attach
from medmm_ray.stats.label_arrays import (
    RIGHT,
    UNLABELLED,
    WRONG,
    Codes,
    Ints,
    Steps,
    align_labels,
    drop_texts,
    encode_labels,
    source_labels,
    steps_of,
)

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 3  # of what a step makes: raise it when the same config makes something else
SURE, UNSURE, DISAGREE = 0, 1, 2
DISAGREEMENT = ("sure", "unsure", "disagree")  # the judge is; it is not; judges differ, or Monte Carlo contradicts
RANDOM = "random"
# The label source and the annotators of a truth that the source of the pictures knows.
TRUTH_SOURCE = "phantom"
EXPERT, TRUTH = "phantom-expert", "phantom-truth"


class ReviewConfig(Config):
    """How many steps an expert reads, and who the expert is."""

    review_steps: int = Field(1000, ge=0)
    """Steps in the queue, at most; a step that two strata draw counts twice."""
    random_share: float = Field(0.2, ge=0, le=1)
    """Share of the queue that is drawn from all steps alike."""
    expert: Literal["phantom", "none", "readers"] = "phantom"
    """phantom: the source's truth answers; none: the queue waits for readers; readers: `verdicts` has their answers."""
    verdicts: str = ""
    """readers: the export of their verdicts to take, as python -m jobs.review_page --export names it (a hash)."""
    truth_splits: Splits = ("test",)
    """phantom: splits whose solutions get the truth of every step."""
    seed: int = 0
    """Start of the drawing."""
    batch_size: int = execution(32, ge=1)
    """Questions in one call."""
    num_cpus: float = execution(0.5)
    """Logical CPUs of an actor."""
    num_actors: int = execution(2)
    """Most actors at a time."""

    @model_validator(mode="after")
    def _readers_have_verdicts(self) -> "ReviewConfig":
        if (self.expert == "readers") != bool(self.verdicts):
            raise ValueError(
                f"review.expert is {self.expert!r} and review.verdicts {self.verdicts!r}: readers need an export "
                "(python -m jobs.review_page recipe.yaml --export names one), and only they have one"
            )
        return self


def queue(
    solutions: pa.Table,
    questions: pa.Table,
    judge_labels: pa.Table,
    monte_carlo_labels: pa.Table,
    config: ReviewConfig,
) -> list[ReviewItem]:
    """The steps that an expert should read; sorted, the same for the same tables in any order of rows.

    Needs question_id and solutions; question_id, difficulty, modality; and the labels tables whole.
    """
    steps = steps_of(drop_texts(solutions))
    disagreement = disagreement_of(steps, judge_labels, monte_carlo_labels)
    place = pc.index_in(solutions["question_id"], questions["question_id"].combine_chunks())
    groups = pc.binary_join_element_wise(
        questions["difficulty"].take(place), questions["modality"].take(place), "/"
    ).to_pylist()
    texts, numbers = np.unique(np.array(groups, dtype=np.str_), return_inverse=True)  # sorted: rows come in any order
    group = numbers[steps.question][steps.solution]
    stratum = group * len(DISAGREEMENT) + disagreement
    ids = steps.solution_ids.to_pylist()
    chance = step_chances(ids, config.seed, steps)
    num_random = round(config.random_share * config.review_steps)
    drawn, probability = draw(stratum, chance, config.review_steps - num_random, num_random)
    by_stratum = drawn == 1
    question_ids = solutions["question_id"].to_pylist()
    items = [
        ReviewItem(
            question_id=question_ids[steps.question[steps.solution[row]]],
            solution_id=ids[steps.solution[row]],
            step_index=int(steps.index[row]),
            stratum=f"{texts[group[row]]}/{DISAGREEMENT[disagreement[row]]}" if by_stratum[row] else RANDOM,
            inclusion_probability=float(probability[row]),
        )
        for row in np.flatnonzero(drawn)
    ]
    return sorted(items, key=lambda item: (item.question_id, item.solution_id, item.step_index))


def disagreement_of(steps: Steps, judge_labels: pa.Table, monte_carlo_labels: pa.Table) -> Ints:
    """SURE, UNSURE or DISAGREE for each step; one without labels is UNSURE, as is one where any judge is.

    Judges disagree where one calls a step right and another wrong. The judge (several: their majority) speaks of a step
    and Monte Carlo of the prefix that ends there, which the judge calls wrong from its first wrong step on.
    """
    right, wrong, low, looked = _said_of_steps(steps, judge_labels)
    judged, rolled = _codes(steps, judge_labels, "judge"), _codes(steps, monte_carlo_labels, "monte_carlo")
    wrong_so_far = np.cumsum(judged == WRONG)
    wrong_before = np.where(steps.first > 0, wrong_so_far[steps.first - 1], 0) if len(judged) else wrong_so_far
    prefix = np.where(wrong_so_far - wrong_before[steps.solution] == 0, RIGHT, WRONG)
    disagree = (right & wrong) | ((judged >= WRONG) & (rolled >= WRONG) & (prefix != rolled))
    return np.where(disagree, DISAGREE, np.where(low | ~looked, UNSURE, SURE))


def _codes(steps: Steps, labels: pa.Table, source: str) -> Codes:
    """What the annotators of `source` say of each step together."""
    own = encode_labels(labels.filter(pc.equal(labels["source"], source)).combine_chunks())
    found = source_labels(steps, own)
    return found[source].codes if source in found else np.full(len(steps.solution), UNLABELLED, dtype=np.int8)


def _said_of_steps(steps: Steps, labels: pa.Table) -> list[NDArray[np.bool_]]:
    """Whether any judge calls each step right, wrong, says so with low confidence, and looked at it at all."""
    own = labels.filter(pc.and_(pc.equal(labels["source"], "judge"), pc.is_null(labels["error"]))).combine_chunks()
    flat = pc.list_flatten(own["steps"].combine_chunks())
    label, confidence = flat.field("label"), flat.field("confidence")
    masks = (
        pc.equal(label, RIGHT),
        pc.equal(label, WRONG),
        pc.equal(confidence, "low"),
        pc.or_(pc.is_valid(label), pc.is_valid(confidence)),
    )
    found = align_labels(steps, own)
    said = []
    for mask in masks:
        any_ = np.zeros(len(steps.solution), dtype=bool)
        any_[found.row[np.asarray(pc.fill_null(mask, False), dtype=bool)[found.entry]]] = True
        said.append(any_)
    return said


def step_chances(solution_ids: Sequence[str], seed: int, steps: Steps) -> NDArray[np.float64]:
    """Two independent numbers in [0, 1) a step, [2, num_steps], that depend on the seed and the step's id alone."""
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest(), "big") for i in solution_ids],
        dtype=np.uint64,
    )
    base = hashes[steps.solution] + (2 * steps.index).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    both = np.stack([base, base + np.uint64(0x9E3779B97F4A7C15)])
    return (_mix(both) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: neighbouring integers become unrelated ones."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw(
    stratum: Ints, chance: NDArray[np.float64], num_stratified: int, num_random: int
) -> tuple[Ints, NDArray[np.float64]]:
    """Draw steps from strata alike and from all of them, both without replacement.

    Gives for each step 0 (not drawn), 1 (by its stratum) or 2 (by the random stratum alone), and its probability to be
    drawn by either: 1 − (1 − n_h / N_h)(1 − n_random / N).
    """
    total = len(stratum)
    if not total:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    names, member = np.unique(stratum, return_inverse=True)
    sizes = np.bincount(member, minlength=len(names))
    shares = np.array(allocate(sizes.tolist(), num_stratified))
    order = np.lexsort((chance[0], member))
    rank = np.empty(total, dtype=np.int64)
    rank[order] = np.arange(total) - (np.cumsum(sizes) - sizes)[member[order]]
    stratified = rank < shares[member]
    num_random = min(num_random, total)
    random_ = np.zeros(total, dtype=bool)
    random_[np.argsort(chance[1], kind="stable")[:num_random]] = True
    probability = 1.0 - (1.0 - (shares / sizes)[member]) * (1.0 - num_random / total)
    return np.where(stratified, 1, np.where(random_, 2, 0)), probability


def allocate(sizes: Sequence[int], budget: int) -> list[int]:
    """Deal `budget` draws evenly over strata of `sizes`; what a small stratum cannot use goes to the others."""
    shares = [0] * len(sizes)
    left = min(budget, sum(sizes))
    for position, number in enumerate(sorted(range(len(sizes)), key=lambda i: (sizes[i], i))):
        shares[number] = min(sizes[number], left // (len(sizes) - position))
        left -= shares[number]
    return shares


def review(
    ds: "Dataset",
    config: ReviewConfig,
    *,
    items: Sequence[ReviewItem],
    questions: pa.Table,
    images: pa.Table,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels}``: the expert's labels of the queue `items`, and the truth.

    With another expert than the truth, or for questions whose source does not know it, the lists are empty.
    """
    from ray.data import ActorPoolStrategy

    ds = attach(ds, questions, "question_id", ["source", "split", "options", "answer", "image_ids"])
    return ds.map_batches(
        Expert,
        fn_constructor_kwargs={
            "config": config,
            "items": [(item.solution_id, item.step_index) for item in items],
            "images": images.select(["image_id", "annotation"]),
        },
        batch_format="pyarrow",
        batch_size=config.batch_size,
        compute=ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_cpus=config.num_cpus,
    )


@dataclass(frozen=True)
class GoldAnswer:
    """What a statement of the answer is compared with: the options, and the letter of the right one."""

    options: Sequence[str]
    answer: str


class Expert:
    """The actor: knows the truth of the pictures that a source drew."""

    def __init__(self, config: ReviewConfig, items: Iterable[tuple[str, int]], images: pa.Table) -> None:
        self.config = config
        self.queue: dict[str, set[int]] = {}
        for solution_id, index in items:
            self.queue.setdefault(solution_id, set()).add(index)
        self.annotations = dict(zip(images["image_id"].to_pylist(), images["annotation"].to_pylist(), strict=True))

    def __call__(self, batch: pa.Table) -> pa.Table:
        labels = to_arrow_lists(Labels, [self.label(row) for row in batch.to_pylist()])
        return pa.table({"question_id": batch["question_id"], "labels": labels})

    def label(self, row: Mapping[str, Any]) -> list[Labels]:
        """The labels of one question's solutions."""
        if self.config.expert != TRUTH_SOURCE or row["source"] not in WITH_TRUTH or not row["solutions"]:
            return []
        source = load_with_truth(row["source"])
        picture = source.drawn_picture(self.annotations[row["image_ids"][0]])
        gold = GoldAnswer(row["options"], row["answer"])
        labels = []
        for solution in row["solutions"]:
            asked = self.queue.get(solution["solution_id"])
            if asked:
                labels.append(truth_labels(row["question_id"], solution, picture, gold, "expert", EXPERT, asked))
            if row["split"] in self.config.truth_splits:
                everything = range(len(solution["steps"]))
                labels.append(
                    truth_labels(row["question_id"], solution, picture, gold, TRUTH_SOURCE, TRUTH, everything)
                )
        return labels


def truth_labels(
    question_id: str,
    solution: Mapping[str, Any],
    picture: DrawnPicture,
    gold: GoldAnswer,
    source: str,
    annotator: str,
    asked: Iterable[int],
) -> Labels:
    """The truth of the `asked` steps of a solution; the other steps are empty."""
    wanted = set(asked)
    return Labels(
        question_id=question_id,
        solution_id=solution["solution_id"],
        source=source,
        annotator=annotator,
        steps=[
            truth_label(picture.truth(step, gold)) if index in wanted else StepLabel()
            for index, step in enumerate(solution["steps"])
        ],
        cost=0.0,
    )


def truth_label(right: bool | None) -> StepLabel:
    """The expert's verdict; a step without anything to check has no label but was looked at."""
    if right is None:
        return StepLabel(confidence="high", reason="nothing to check")
    return StepLabel(label=int(right), confidence="high")
