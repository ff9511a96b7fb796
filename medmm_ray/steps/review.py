"""The expert's queue, and the expert's verdicts.

Enters: solutions, their questions and images, the labels so far. Leaves: `ReviewItem` rows, a sample of all steps in
strata of difficulty x modality x disagreement plus a random stratum, each with its inclusion probability; and labels of
source "expert" for the steps of the queue (the other steps empty). Where the source knows its pictures the expert is
the truth, and whole solutions of `truth_splits` get it for measuring; elsewhere readers are, through the review page.

The queue is drawn on columns, some questions at a time: what is held are the steps that may still be drawn.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medmm_ray.config import Config, Splits, execution
from medmm_ray.data.records import Labels, Question, ReviewItem, Solutions, StepLabel, arrow_schema, to_arrow_lists
from medmm_ray.data.sorted_rows import SortedRows, rows_among, scratch_folder, sort_tables, windows
from medmm_ray.data.sources import WITH_TRUTH, DrawnPicture, load_with_truth
from medmm_ray.data.tables import attach
from medmm_ray.estimate import Line
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
NOT_DRAWN, BY_STRATUM, AT_RANDOM = 0, 1, 2
QUESTION_COLUMNS = ["source", "split", "options", "answer", "image_ids"]
RANDOM = "random"  # the stratum of what was drawn from all steps alike
# The label source and the annotators of a truth that the source of the pictures knows.
TRUTH_SOURCE = "phantom"
EXPERT, TRUTH = "phantom-expert", "phantom-truth"


class ReviewConfig(Config):
    """How many steps an expert reads, and who the expert is."""

    review_steps: int = Field(1000, ge=0)
    """Steps in the queue, at most; a step that two strata draw_steps counts twice."""
    random_share: float = Field(0.2, ge=0, le=1)
    """Share of the queue that is drawn from all steps alike."""
    expert: Literal["phantom", "none", "readers"] = "phantom"
    """phantom: the source's truth answers; none: the queue waits for readers; readers: `verdicts` has their answers."""
    verdicts: str = ""
    """readers: the export of their verdicts to take, as python -m jobs.review_page --export names it (a hash)."""
    truth_splits: Splits = ("test",)
    """phantom: splits whose solutions get the truth of every step."""
    seed: int = 0
    """Seed of the drawing of the queue."""
    batch_size: int = execution(32, ge=1)
    """Questions that an actor labels at a time."""
    num_cpus: float = execution(0.5)
    """Logical CPU cores that an actor asks for."""
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


def review_cost(config: ReviewConfig, dollars_per_step: float) -> Line:
    """The line of the experts' review."""
    steps = config.review_steps
    return Line(step="review", work=f"{steps:,} steps", calls=steps, dollars=steps * dollars_per_step)


def queue(
    solutions: Iterable[pa.Table],
    questions: Iterable[pa.Table],
    judge_labels: Iterable[pa.Table],
    monte_carlo_labels: Iterable[pa.Table],
    config: ReviewConfig,
) -> list[ReviewItem]:
    """The steps that an expert should read; sorted, the same for the same tables in any order of rows.

    Needs question_id and solutions; question_id, difficulty, modality; and the labels tables whole. All come in parts,
    and are read some questions at a time.
    """
    labels = arrow_schema(Labels)
    # A share is drawn from all steps alike: strata that the labels misjudge stay represented.
    num_random = round(config.random_share * config.review_steps)
    draw = StepDraw(config.review_steps - num_random, num_random)
    with scratch_folder() as folder:
        parts = {
            "solutions": (map(_without_texts, solutions), _SOLUTIONS),
            "questions": (questions, _QUESTIONS),
            "judge": (judge_labels, labels),
            "monte_carlo": (monte_carlo_labels, labels),
        }
        for window in windows(sort_tables(parts, "question_id", folder)):
            draw.offer(_candidates(window, config.seed))
    return draw.items()


_QUESTIONS = pa.schema([arrow_schema(Question).field(name) for name in ("question_id", "difficulty", "modality")])


def _without_texts(solutions: pa.Table) -> pa.Table:
    return drop_texts(solutions.select(["question_id", "solutions"]))


_SOLUTIONS = _without_texts(arrow_schema(Solutions).empty_table()).schema


_CANDIDATE = pa.schema(
    {
        "question_id": pa.string(),
        "solution_id": pa.string(),
        "step_index": pa.int64(),
        "group": pa.string(),
        "level": pa.int64(),
        # The chances by which a step is drawn, see `draw_steps`.
        "by_stratum": pa.float64(),
        "at_random": pa.float64(),
    }
)


def _candidates(window: Mapping[str, pa.Table], seed: int) -> pa.Table:
    """The steps of a window's questions, as they take part in the draw."""
    solutions = window["solutions"]
    steps = steps_of(solutions)
    group_names, group = _groups_of_steps(steps, solutions, window["questions"])
    by_stratum, at_random = step_chances(steps.solution_ids.to_pylist(), seed, steps)
    columns = {
        "question_id": solutions["question_id"].take(pa.array(steps.row[steps.solution])),
        "solution_id": steps.solution_ids.take(pa.array(steps.solution)),
        "step_index": steps.index,
        "group": pa.array(group_names, pa.string()).take(pa.array(group)),
        "level": disagreement_levels(steps, window["judge"], window["monte_carlo"]),
        "by_stratum": by_stratum,
        "at_random": at_random,
    }
    return pa.table(columns).cast(_CANDIDATE)


def _groups_of_steps(
    steps: Steps,
    solutions: pa.Table,
    questions: pa.Table,
) -> tuple[Sequence[str], Ints]:
    """The names difficulty/modality, and for each step the number of its question's."""
    question_row = pc.index_in(solutions["question_id"], questions["question_id"].combine_chunks())
    difficulty = questions["difficulty"].take(question_row)
    modality = questions["modality"].take(question_row)
    names_of_questions = pc.binary_join_element_wise(difficulty, modality, "/").to_pylist()
    # Sorted names give the same strata in any order of rows.
    names, number = np.unique(np.array(names_of_questions, dtype=np.str_), return_inverse=True)
    return names.tolist(), number[steps.question][steps.solution]


# What is disputed


def disagreement_levels(
    steps: Steps,
    judge_labels: pa.Table,
    monte_carlo_labels: pa.Table,
) -> Ints:
    """SURE, UNSURE or DISAGREE for each step; one without labels is UNSURE, as is one where any judge is.

    Judges disagree where one calls a step right and another wrong. The judge (several: their majority) speaks of a step
    and Monte Carlo of the prefix that ends there, which the judge calls wrong from its first wrong step on.
    """
    judges = _judge_marks(steps, judge_labels)
    judge_codes = _codes(steps, judge_labels, "judge")
    monte_carlo_codes = _codes(steps, monte_carlo_labels, "monte_carlo")
    both_labelled = (judge_codes >= WRONG) & (monte_carlo_codes >= WRONG)
    prefix_codes = _prefix_verdicts(steps, judge_codes)
    contradicted = both_labelled & (prefix_codes != monte_carlo_codes)
    disputed = (judges.right & judges.wrong) | contradicted
    unsure = judges.low_confidence | ~judges.looked_at
    undisputed_level = np.where(unsure, UNSURE, SURE)
    return np.where(disputed, DISAGREE, undisputed_level)


def _prefix_verdicts(steps: Steps, codes: Codes) -> Codes:
    """RIGHT or WRONG for the prefix that ends at each step: wrong from the solution's first wrong step on."""
    # Without a step there is no first one to look before.
    if not len(codes):
        return codes
    num_wrong = np.cumsum(codes == WRONG)
    before_solution = np.where(steps.first > 0, num_wrong[steps.first - 1], 0)
    wrong_in_prefix = num_wrong - before_solution[steps.solution]
    return np.where(wrong_in_prefix == 0, RIGHT, WRONG).astype(np.int8)


def _codes(
    steps: Steps,
    labels: pa.Table,
    source: str,
) -> Codes:
    """What the annotators of `source` say of each step together."""
    rows = labels.filter(pc.equal(labels["source"], source))
    encoded = encode_labels(rows.combine_chunks())
    by_source = source_labels(steps, encoded)
    if source not in by_source:
        return np.full(len(steps.solution), UNLABELLED, dtype=np.int8)
    return by_source[source].codes


@dataclass(frozen=True)
class _JudgeMarks:
    """Whether any judge calls each step right, wrong, says so with low confidence, and looked at it at all."""

    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    low_confidence: NDArray[np.bool_]
    looked_at: NDArray[np.bool_]


def _judge_marks(steps: Steps, labels: pa.Table) -> _JudgeMarks:
    is_judge = pc.equal(labels["source"], "judge")
    usable = pc.and_(is_judge, pc.is_null(labels["error"]))
    of_judges = labels.filter(usable).combine_chunks()
    entries = pc.list_flatten(of_judges["steps"].combine_chunks())
    label, confidence = entries.field("label"), entries.field("confidence")
    places = align_labels(steps, of_judges)

    # Several judges label a step: an entry a judge, where source codes would hold their majority.
    def any_of_step(mask: pa.Array) -> NDArray[np.bool_]:
        """A mask of label entries as one of steps."""
        of_entries = np.asarray(pc.fill_null(mask, False), dtype=bool)
        marked = of_entries[places.entry]
        of_steps = np.zeros(len(steps.solution), dtype=bool)
        of_steps[places.row[marked]] = True
        return of_steps

    return _JudgeMarks(
        right=any_of_step(pc.equal(label, RIGHT)),
        wrong=any_of_step(pc.equal(label, WRONG)),
        low_confidence=any_of_step(pc.equal(confidence, "low")),
        looked_at=any_of_step(pc.or_(pc.is_valid(label), pc.is_valid(confidence))),
    )


# The drawing


def step_chances(
    solution_ids: Sequence[str],
    seed: int,
    steps: Steps,
) -> NDArray[np.float64]:
    """Two independent numbers in [0, 1) a step, [2, num_steps], that depend on the seed and the step's id alone."""
    hashes = np.empty(len(solution_ids), dtype=np.uint64)
    for place, solution_id in enumerate(solution_ids):
        key = f"{seed}/{solution_id}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        hashes[place] = int.from_bytes(digest, "big")
    # Each solution is a stream of splitmix64 that its hash starts; a step takes two of its numbers.
    offset = (2 * steps.index).astype(np.uint64)
    first = hashes[steps.solution] + offset * _GOLDEN_GAMMA
    both = np.stack([first, first + _GOLDEN_GAMMA])
    # The upper 53 bits are what a double holds exactly.
    upper_bits = _mix(both) >> np.uint64(11)
    return upper_bits.astype(np.float64) / 2.0**53


_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: neighbouring integers become unrelated ones."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class StepDraw:
    """Draws steps as `draw_steps` does, from those of some questions at a time.

    What is in memory are the steps that may still be drawn: of each stratum and of all steps those of the lowest
    chances.
    """

    def __init__(self, num_stratified: int, num_random: int) -> None:
        self.num_stratified = num_stratified
        self.num_random = num_random
        self._sizes: Counter[tuple[str, int]] = Counter()
        self._candidates = _CANDIDATE.empty_table()

    def offer(self, steps: pa.Table) -> None:
        """Let the steps of questions that were not there before take part (`_CANDIDATE`)."""
        counts = steps.group_by(["group", "level"]).aggregate([([], "count_all")])
        for stratum in counts.to_pylist():
            self._sizes[stratum["group"], stratum["level"]] += stratum["count_all"]
        # Who is not among the lowest of a window is not among the lowest of all: few are put to the others.
        candidates = pa.concat_tables([self._candidates, self._lowest(steps)])
        self._candidates = self._lowest(candidates).combine_chunks()

    def _lowest(self, steps: pa.Table) -> pa.Table:
        # Ranks among these alone: they are no higher than among all.
        member = self._members(steps)
        sizes = np.bincount(member, minlength=len(self._sizes))
        by_stratum = _ranks(member, sizes, np.asarray(steps["by_stratum"])) < self.num_stratified
        everything = np.zeros(steps.num_rows, dtype=np.int64)
        at_random = _ranks(everything, np.array([steps.num_rows]), np.asarray(steps["at_random"])) < self.num_random
        return steps.filter(pa.array(by_stratum | at_random))

    def _members(self, steps: pa.Table) -> Ints:
        """The number of each step's stratum, which does not depend on the order in which they came."""
        numbers = {stratum: number for number, stratum in enumerate(sorted(self._sizes))}
        strata = zip(steps["group"].to_pylist(), steps["level"].to_pylist(), strict=True)
        return np.fromiter(map(numbers.__getitem__, strata), dtype=np.int64, count=steps.num_rows)

    def items(self) -> list[ReviewItem]:
        """What is drawn of all that was offered, sorted."""
        candidates = self._candidates
        chance = np.stack([np.asarray(candidates["by_stratum"]), np.asarray(candidates["at_random"])])
        drawn_by, probability = _draw(
            self._members(candidates),
            np.array([self._sizes[stratum] for stratum in sorted(self._sizes)], dtype=np.int64),
            chance,
            self.num_stratified,
            self.num_random,
        )
        items: list[ReviewItem] = []
        for row in np.flatnonzero(drawn_by).tolist():
            step = candidates.slice(row, 1).to_pylist()[0]
            stratum = f"{step['group']}/{DISAGREEMENT[step['level']]}"
            items.append(
                ReviewItem(
                    question_id=step["question_id"],
                    solution_id=step["solution_id"],
                    step_index=step["step_index"],
                    stratum=stratum if drawn_by[row] == BY_STRATUM else RANDOM,
                    inclusion_probability=float(probability[row]),
                )
            )
        return sorted(items, key=lambda item: (item.question_id, item.solution_id, item.step_index))


def draw_steps(
    stratum: Ints,
    chance: NDArray[np.float64],
    num_stratified: int,
    num_random: int,
) -> tuple[Ints, NDArray[np.float64]]:
    """Draw steps from strata alike and from all of them, both without replacement.

    `stratum` [N] numbers the stratum of each step, `chance` [2, N] are two numbers in [0, 1) each. Gives for each step
    NOT_DRAWN, BY_STRATUM or AT_RANDOM (by the random stratum alone), and its probability to be drawn by either:
    1 − (1 − n_h / N_h)(1 − n_random / N).
    """
    # Strata without a step get no share.
    names, member = np.unique(stratum, return_inverse=True)
    return _draw(member, np.bincount(member, minlength=len(names)), chance, num_stratified, num_random)


def _draw(
    member: Ints,
    sizes: Ints,
    chance: NDArray[np.float64],
    num_stratified: int,
    num_random: int,
) -> tuple[Ints, NDArray[np.float64]]:
    """`draw_steps` from strata of `sizes`, of whose steps those of the lowest chances are here."""
    total = int(sizes.sum())
    if not total:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    shares = np.array(allocate_draws(sizes.tolist(), num_stratified))
    here = np.bincount(member, minlength=len(sizes))
    by_stratum = _ranks(member, here, chance[0]) < shares[member]
    num_random = min(num_random, total)
    at_random = np.zeros(len(member), dtype=bool)
    by_chance = np.argsort(chance[1], kind="stable")
    at_random[by_chance[:num_random]] = True
    # The two drawings are independent: a step is missed where both miss it.
    missed_by_stratum = 1.0 - (shares / sizes)[member]
    probability = 1.0 - missed_by_stratum * (1.0 - num_random / total)
    otherwise = np.where(at_random, AT_RANDOM, NOT_DRAWN)
    drawn_by = np.where(by_stratum, BY_STRATUM, otherwise)
    return drawn_by, probability


def _ranks(
    member: Ints,
    sizes: Ints,
    chance: NDArray[np.float64],
) -> Ints:
    """The rank of each step within its stratum of `sizes`, by its chance."""
    order = np.lexsort((chance, member))
    stratum_start = np.cumsum(sizes) - sizes
    rank = np.empty(len(member), dtype=np.int64)
    rank[order] = np.arange(len(member)) - stratum_start[member[order]]
    return rank


def allocate_draws(sizes: Sequence[int], budget: int) -> list[int]:
    """Deal `budget` draws evenly over strata of `sizes`; what a small stratum cannot use goes to the larger ones."""
    shares = [0] * len(sizes)
    # Smallest first: what a stratum cannot take is dealt among those that are left.
    remaining = min(budget, sum(sizes))
    smallest_first = sorted(range(len(sizes)), key=lambda number: (sizes[number], number))
    for position, number in enumerate(smallest_first):
        shares[number] = min(sizes[number], remaining // (len(sizes) - position))
        remaining -= shares[number]
    return shares


# The expert


def review(
    ds: "Dataset",
    config: ReviewConfig,
    *,
    items: Sequence[ReviewItem],
    questions: pa.Table | SortedRows,
    annotations: pa.Table | SortedRows,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels}``: the expert's labels of the queue `items`, and the truth.

    `annotations` are those of the images; the tables may be `SortedRows`, of which each task reads what it needs. With
    another expert than the truth, or for questions whose source does not know it, the lists are empty.
    """
    from ray.data import ActorPoolStrategy

    ds = attach(
        ds,
        questions,
        "question_id",
        QUESTION_COLUMNS,
    )
    return ds.map_batches(
        Expert,
        fn_constructor_kwargs={
            "config": config,
            "items": [(item.solution_id, item.step_index) for item in items],
            "annotations": annotations,
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

    def __init__(
        self,
        config: ReviewConfig,
        items: Iterable[tuple[str, int]],
        annotations: pa.Table | SortedRows,
    ) -> None:
        self.config = config
        self.queue: dict[str, set[int]] = {}
        for solution_id, index in items:
            self.queue.setdefault(solution_id, set()).add(index)
        self.images = annotations

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of solutions with their question's columns -> question_id and labels."""
        by_row = list(map(self.label, batch.to_pylist()))
        labels = to_arrow_lists(Labels, by_row)
        return pa.table({"question_id": batch["question_id"], "labels": labels})

    def label(self, row: Mapping[str, Any]) -> list[Labels]:
        """The labels of one question's solutions."""
        if self.config.expert != TRUTH_SOURCE:
            return []
        if row["source"] not in WITH_TRUTH or not row["solutions"]:
            return []
        source = load_with_truth(row["source"])
        image_id = row["image_ids"][0]
        image = rows_among(self.images, "image_id", [image_id])[image_id]
        picture = source.drawn_picture(image["annotation"])
        gold = GoldAnswer(row["options"], row["answer"])
        labels = []
        for solution in row["solutions"]:
            # The expert reads single steps of the queue, the truth whole solutions: they are labels of two sources.
            queued = self.queue.get(solution["solution_id"])
            if queued:
                labels.append(
                    truth_labels(
                        row["question_id"],
                        solution,
                        picture,
                        gold,
                        "expert",
                        EXPERT,
                        queued,
                    )
                )
            if row["split"] in self.config.truth_splits:
                all_steps = range(len(solution["steps"]))
                labels.append(
                    truth_labels(
                        row["question_id"],
                        solution,
                        picture,
                        gold,
                        TRUTH_SOURCE,
                        TRUTH,
                        all_steps,
                    )
                )
        return labels


def truth_labels(
    question_id: str,
    solution: Mapping[str, Any],
    picture: DrawnPicture,
    gold: GoldAnswer,
    source: str,
    annotator: str,
    indices: Iterable[int],
) -> Labels:
    """The truth of a solution's steps of these `indices`; the other steps are empty."""
    looked_at = set(indices)
    steps = []
    for index, step in enumerate(solution["steps"]):
        # Empty: the source knows of this step too, but nobody was to read it.
        label = StepLabel()
        if index in looked_at:
            label = truth_label(picture.truth(step, gold))
        steps.append(label)
    return Labels(
        question_id=question_id,
        solution_id=solution["solution_id"],
        source=source,
        annotator=annotator,
        steps=steps,
        cost=0.0,
    )


def truth_label(right: bool | None) -> StepLabel:
    """The expert's verdict; a step without anything to check has no label but was looked at."""
    if right is None:
        return StepLabel(confidence="high", reason="nothing to check")
    return StepLabel(label=int(right), confidence="high")
