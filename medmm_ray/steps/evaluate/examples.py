"""Questions worth a look, with their images and the solutions that the scorers chose, step by step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.data.records import Question, Solution, from_dict
from medmm_ray.stats import decoders, metrics
from medmm_ray.steps.evaluate.scored_questions import LogOdds, ScoredQuestion
from medmm_ray.steps.evaluate.steps import StepLabels

KINDS = ("rescued", "missed", "agreed")
OVERRATED, UNDERRATED = "overrated", "underrated"
"""Kinds of a disagreement: the scorer holds a wrong step for right, or a right one for wrong."""
StepParts = Mapping[str, tuple[list[float], list[float]]]
"""By solution: the text and the image part of each step's log-odds."""


@dataclass(frozen=True, kw_only=True)
class ExampleImage:
    """An image of the question."""

    image_id: str
    uri: str
    diagnosis: str


@dataclass(frozen=True, kw_only=True)
class ExampleStep:
    """A step, the probability that it is right, the two parts that make it up, and its label (None: no side)."""

    text: str
    probability: float
    text_log_odds: float
    image_log_odds: float
    truth: int | None


@dataclass(frozen=True, kw_only=True)
class ExampleSolution:
    """A scored solution; `roles` say why it is shown."""

    solution_id: str
    roles: list[str]
    answer: str | None
    correct: bool
    reward: float
    steps: list[ExampleStep]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question worth a look, of one of `KINDS` or a disagreement; `share_right` is that of its samples.

    `step` is the place of the step that is disagreed on.
    """

    kind: str
    question_id: str
    question: str
    options: list[str]
    answer: str
    answer_type: str
    difficulty: str
    modality: str
    images: list[ExampleImage]
    share_right: float
    solutions: list[ExampleSolution]
    step: int | None = None


@dataclass(frozen=True)
class _Sources:
    """What the examples' texts and numbers are looked up in: by question, by image, by solution."""

    solutions: Mapping[str, Sequence[Solution]]
    images: Mapping[str, ExampleImage]
    step_parts: StepParts
    labels: StepLabels


def choose_examples(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    solutions: pa.Table,
    images: pa.Table,
    scores: pa.Table,
    labels: StepLabels,
    *,
    num_examples: int,
    seed: int,
) -> list[Example]:
    """`num_examples` questions, in turn of three kinds, within a kind by the hash of their id.

    rescued: the scorer's choice is right, the text-only one's wrong; missed: its choice is wrong although a right
    answer was there; agreed: both are right. The scorer is the multimodal arm, or the first one where there is none.
    """
    if not arms:
        return []
    main_arm = "multimodal" if "multimodal" in arms else arms[0]
    by_kind: dict[str, list[ScoredQuestion]] = {kind: [] for kind in KINDS}

    def by_hash(scored: ScoredQuestion) -> str:
        """A place in the choice that depends on no property of the question but its id."""
        return digest(
            seed,
            "example",
            scored.question.question_id,
        )

    for scored in sorted(questions, key=by_hash):
        kind = _kind(scored, main_arm)
        if kind:
            by_kind[kind].append(scored)
    chosen = list(_in_turn(by_kind))[:num_examples]
    sources = _sources(
        [scored.question for _, scored in chosen],
        main_arm,
        solutions,
        images,
        scores,
        labels,
    )
    examples = []
    for kind, scored in chosen:
        examples.append(
            _example(
                kind,
                scored,
                main_arm,
                sources,
                _roles(scored, main_arm),
            )
        )
    return examples


def _in_turn(by_kind: Mapping[str, Sequence[ScoredQuestion]]) -> Iterator[tuple[str, ScoredQuestion]]:
    """The first question of each kind, then the second of each, and so on."""
    most = max(map(len, by_kind.values()))
    for place in range(most):
        for kind, questions in by_kind.items():
            if place < len(questions):
                yield kind, questions[place]


def _sources(
    questions: Sequence[Question],
    arm: str,
    solutions: pa.Table,
    images: pa.Table,
    scores: pa.Table,
    labels: StepLabels,
) -> _Sources:
    # Filtered in Arrow: the texts of a few questions alone become Python objects.
    question_ids = pa.array([question.question_id for question in questions], pa.string())
    has_example = pc.is_in(solutions["question_id"], question_ids)
    solutions_by_question = {}
    for row in solutions.filter(has_example).to_pylist():
        solutions_by_question[row["question_id"]] = [from_dict(Solution, solution) for solution in row["solutions"]]
    is_scored = pc.and_(
        pc.is_in(scores["question_id"], question_ids),
        pc.equal(scores["arm"], arm),
    )
    step_parts = {}
    for row in scores.filter(is_scored).to_pylist():
        step_parts[row["solution_id"]] = (row["text_log_odds"], row["image_log_odds"])
    shown_ids: set[str] = set()
    for question in questions:
        shown_ids.update(question.image_ids)
    is_shown = pc.is_in(images["image_id"], pa.array(sorted(shown_ids), pa.string()))
    image_rows = images.filter(is_shown).select(["image_id", "uri", "diagnosis"]).to_pylist()
    return _Sources(
        solutions=solutions_by_question,
        images={row["image_id"]: ExampleImage(**row) for row in image_rows},
        step_parts=step_parts,
        labels=labels,
    )


def choose_disagreements(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    solutions: pa.Table,
    images: pa.Table,
    scores: pa.Table,
    labels: StepLabels,
    log_odds: Mapping[str, LogOdds],
    num: int,
) -> list[Example]:
    """The steps on which the main arm is most sure of the opposite of the labels, surest first, one a question."""
    if not arms:
        return []
    main_arm = "multimodal" if "multimodal" in arms else arms[0]
    by_sureness: list[tuple[float, ScoredQuestion, int, int]] = []
    for scored in questions:
        worst = _worst_step(
            scored,
            labels,
            log_odds[main_arm],
        )
        if worst is not None:
            by_sureness.append((worst.sureness, scored, worst.place, worst.step))
    # The id decides between equals: the order of a table must not.
    by_sureness.sort(key=lambda entry: (-entry[0], entry[1].question.question_id))
    chosen = by_sureness[:num]
    sources = _sources(
        [entry[1].question for entry in chosen],
        main_arm,
        solutions,
        images,
        scores,
        labels,
    )
    examples = []
    for _, scored, place, step in chosen:
        label = labels[scored.solution_ids[place]][step]
        # What the scorer did wrong names the case.
        kind = UNDERRATED if label else OVERRATED
        example = _example(
            kind,
            scored,
            main_arm,
            sources,
            {place: []},
        )
        examples.append(replace(example, step=step))
    return examples


@dataclass(frozen=True)
class _WorstStep:
    """A step whose score says the opposite of its label, by `sureness` in log-odds."""

    sureness: float
    place: int
    step: int


def _worst_step(scored: ScoredQuestion, labels: StepLabels, log_odds: LogOdds) -> _WorstStep | None:
    worst = None
    for place, solution_id in enumerate(scored.solution_ids):
        if solution_id not in labels or solution_id not in log_odds:
            continue
        for step, (label, score) in enumerate(
            zip(
                labels[solution_id],
                log_odds[solution_id],
                strict=True,
            )
        ):
            if label is None:
                continue
            # Positive where the score says the opposite of the label.
            sureness = float(-score if label else score)
            if sureness > 0 and (worst is None or sureness > worst.sureness):
                worst = _WorstStep(
                    sureness,
                    place,
                    step,
                )
    return worst


def _example(
    kind: str,
    scored: ScoredQuestion,
    main_arm: str,
    sources: _Sources,
    roles_by_place: Mapping[int, Sequence[str]],
) -> Example:
    question = scored.question
    solutions = sources.solutions[question.question_id]
    entries = []
    for place, roles in roles_by_place.items():
        reward = float(scored.rewards[main_arm][place])
        entries.append(
            _example_solution(
                solutions[place],
                roles,
                reward,
                sources,
            )
        )
    pictures = []
    for image_id in question.image_ids:
        if image_id in sources.images:
            pictures.append(sources.images[image_id])
    return Example(
        kind=kind,
        question_id=question.question_id,
        question=question.question,
        options=question.options,
        answer=question.answer,
        answer_type=question.answer_type,
        difficulty=question.difficulty,
        modality=question.modality,
        images=pictures,
        share_right=round(float(scored.correct.mean()), 6),
        solutions=entries,
    )


def _kind(scored: ScoredQuestion, main_arm: str) -> str | None:
    choice = decoders.best_of_n(scored.rewards[main_arm])
    if choice is None:
        return None
    if not scored.correct[choice]:
        return "missed" if scored.correct.any() else None
    if "text_only" not in scored.rewards:
        return "agreed"
    choice_of_text = decoders.best_of_n(scored.rewards["text_only"])
    # Where no score without the image is there, the image has rescued nothing.
    if choice_of_text is None or scored.correct[choice_of_text]:
        return "agreed"
    return "rescued"


def _roles(scored: ScoredQuestion, main_arm: str) -> dict[int, list[str]]:
    """At most three samples, by place, with their roles: each scorer's choice, and a contrast to the first.

    The contrast is the best sample that is wrong where the first is right, or right where it is wrong.
    """
    roles: dict[int, list[str]] = {}
    for arm in dict.fromkeys((main_arm, "text_only")):
        if arm not in scored.rewards:
            continue
        choice = decoders.best_of_n(scored.rewards[arm])
        if choice is not None:
            roles.setdefault(choice, []).append(f"chosen_{arm}")
    first = next(iter(roles))
    main_rewards = scored.rewards[main_arm]
    # Without a reward a sample is no contrast to be learnt from: NaN is never the best.
    like_first = scored.correct == scored.correct[first]
    contrast_rewards = np.where(
        like_first,
        math.nan,
        main_rewards,
    )
    contrast = decoders.best_of_n(contrast_rewards)
    if contrast is not None:
        roles.setdefault(contrast, []).append("best_wrong" if scored.correct[first] else "best_right")
    scored_roles = {}
    for place, names in roles.items():
        # Its steps have no score to show.
        if not math.isnan(main_rewards[place]):
            scored_roles[place] = names
    return scored_roles


def _example_solution(
    solution: Solution,
    roles: Sequence[str],
    reward: float,
    sources: _Sources,
) -> ExampleSolution:
    texts = solution.steps
    labels = sources.labels.get(solution.solution_id) or [None] * len(texts)
    text_parts, image_parts = sources.step_parts[solution.solution_id]
    steps = []
    for text, by_text, by_image, label in zip(
        texts,
        text_parts,
        image_parts,
        labels,
        strict=True,
    ):
        # Log-odds add: their sum is what the scorer says of the step.
        probability = float(metrics.probability(by_text + by_image))
        steps.append(
            ExampleStep(
                text=text,
                probability=round(probability, 6),
                text_log_odds=round(by_text, 4),
                image_log_odds=round(by_image, 4),
                truth=label,
            )
        )
    return ExampleSolution(
        solution_id=solution.solution_id,
        roles=list(roles),
        answer=solution.answer,
        correct=bool(solution.correct),
        reward=round(float(metrics.probability(reward)), 6),
        steps=steps,
    )
