"""The tables of a made-up run: drawn pictures, questions on them, solutions, scores and labels.

The multimodal scorer knows the picture (with some noise), the text-only one does not; `run` is deterministic.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image as Picture
from PIL import ImageDraw

from medmm_ray.config import digest
from medmm_ray.data.records import (
    Image,
    Labels,
    Question,
    ReviewItem,
    Scores,
    Solution,
    Solutions,
    StepLabel,
    to_arrow,
)
from medmm_ray.steps.audit import AuditConfig, audit

FINDINGS = ("a right pleural effusion", "a left pneumothorax", "an enlarged heart", "no acute abnormality")
SIGNS = (
    "The right costophrenic angle is blunted.",
    "No lung markings reach the left apex.",
    "The heart is wider than half of the chest.",
    'Both lungs are clear & fully expanded (no "<b>" sign).',
)
TEMPLATES = ("What does this film show?", "Which finding explains the complaint?", "Which of these is present?")


def draw(finding: int, seed: int) -> Picture.Image:
    """A chest with one of `FINDINGS`."""
    rng = np.random.default_rng(seed)
    picture = Picture.new("L", (80, 80), 30)
    pen = ImageDraw.Draw(picture)
    pen.ellipse((8, 6, 38, 74), fill=90)
    pen.ellipse((42, 6, 72, 74), fill=90)
    heart = 16 if finding == 2 else 9
    pen.ellipse((40 - heart, 38, 44 + heart, 70), fill=190)
    if finding == 0:
        pen.rectangle((8, 56, 36, 76), fill=200)
    if finding == 1:
        pen.ellipse((48, 6, 72, 34), fill=40)
    noisy = np.asarray(picture, dtype=np.float64) + rng.normal(0, 8, (80, 80))
    return Picture.fromarray(noisy.clip(0, 255).astype(np.uint8))


@dataclass
class _Rows:
    """What a made-up run holds so far."""

    rng: np.random.Generator
    scores: list[Scores] = field(default_factory=list)
    judge: list[Labels] = field(default_factory=list)
    phantom: list[Labels] = field(default_factory=list)
    expert: list[Labels] = field(default_factory=list)
    queue: list[ReviewItem] = field(default_factory=list)

    def add_solution(self, question_id: str, index: int, finding: int, believed: int, is_scored: bool) -> Solution:
        """A solution that names a random finding, with its scores and labels. The scorer believes in `believed`."""
        rng = self.rng
        named = int(rng.choice(4, p=(0.4, 0.2, 0.15, 0.25)))
        is_right = named == finding
        steps = [
            "The film is a frontal view.",
            SIGNS[named],
            f"This sign means {FINDINGS[named]}.",
            f"So the answer is ({'ABCD'[named]}).",
        ]
        solution_id = f"s{digest(question_id, index)}"
        is_answered = rng.random() > 0.03
        self._add_scores(question_id, solution_id, agrees=named == believed, is_scored=is_scored)
        self._add_labels(question_id, solution_id, [None, *[int(is_right)] * 3], is_read=index == 1)
        return Solution(
            solution_id=solution_id,
            index=index,
            text=" ".join(steps),
            steps=steps,
            answer="ABCD"[named] if is_answered else None,
            correct=is_right if is_answered else None,
            finish_reason="stop",
            seed=index,
            text_sha="",
        )

    def _add_scores(self, question_id: str, solution_id: str, agrees: bool, is_scored: bool) -> None:
        rng = self.rng
        text = rng.normal((1.2, 0.3, 0.1, -0.1), 0.6)
        own_image = rng.normal([0.1, *[2.6 if agrees else -2.6] * 3], 1.6)
        strange_image = rng.normal([0.1, 0, 0, 0], 2.5)
        arms = {"text_only": 0 * own_image, "multimodal": own_image, "shuffled_image": strange_image}
        for arm, image in arms.items():
            scores = Scores(
                question_id=question_id,
                solution_id=solution_id,
                model="m",
                arm=arm,
                text_log_odds=text.tolist() if is_scored else [],
                image_log_odds=image.tolist() if is_scored else [],
                error=None if is_scored else "image_corrupt: im0000",
            )
            self.scores.append(scores)

    def _add_labels(self, question_id: str, solution_id: str, truth: list[int | None], is_read: bool) -> None:
        """The truth, a judge's labels with some errors, and an expert's of the second step where it is read."""
        judged = [label if label is None or self.rng.random() > 0.08 else 1 - label for label in truth]
        ids: dict[str, Any] = {"question_id": question_id, "solution_id": solution_id, "cost": 0.0001}
        self.judge.append(Labels(**ids, source="judge", annotator="j", steps=_step_labels(judged)))
        self.phantom.append(Labels(**ids, source="phantom", annotator="truth", steps=_step_labels(truth)))
        if is_read:
            read = [None, truth[1], None, None]
            self.expert.append(Labels(**ids, source="expert", annotator="reader", steps=_step_labels(read)))
            item = ReviewItem(
                question_id=question_id,
                solution_id=solution_id,
                step_index=1,
                stratum="easy",
                inclusion_probability=0.25,
            )
            self.queue.append(item)


def _step_labels(labels: list[int | None]) -> list[StepLabel]:
    return [StepLabel(label=label) for label in labels]


def _image(folder: Path, number: int, finding: int) -> Image:
    image_id = f"im{number:04d}"
    path = folder / f"{image_id}.png"
    draw(finding, number).save(path)
    return Image(
        image_id=image_id,
        uri=str(path),
        sha256="",
        perceptual_hash="",
        width=80,
        height=80,
        split="test",
        modality="radiology",
        diagnosis=FINDINGS[finding],
        annotation="{}",
    )


def _question(number: int, finding: int, image_id: str) -> Question:
    return Question(
        question_id=f"q{number:04d}",
        source="phantom",
        split="test",
        modality="radiology",
        difficulty=("easy", "medium", "hard")[number % 3],
        question=TEMPLATES[number % 3],
        options=list(FINDINGS),
        answer="ABCD"[finding],
        answer_type="choice",
        image_ids=[image_id],
    )


def run(folder: Path, num_questions: int = 40, num_samples: int = 16, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `evaluate`: the last question has no solutions, one solution of the first has no scores."""
    rng = np.random.default_rng(seed)
    rows = _Rows(rng)
    questions, images, solutions = [], [], []
    for number in range(num_questions):
        finding = int(rng.integers(4))
        images.append(_image(folder, number, finding))
        questions.append(_question(number, finding, images[-1].image_id))
        question_id = questions[-1].question_id
        believed = finding if rng.random() > 0.08 else int(rng.integers(4))  # what the scorer takes the picture for
        samples = []
        for index in range(num_samples if number < num_questions - 1 else 0):
            is_scored = (number, index) != (0, 0)
            samples.append(rows.add_solution(question_id, index, finding, believed, is_scored))
        sampled = Solutions(
            question_id=question_id,
            policy="p",
            config_hash="c",
            num_requested=num_samples,
            solutions=samples,
            error=None if samples else "engine: died",
        )
        solutions.append(sampled)
    tables = {
        "questions": to_arrow(Question, questions),
        "images": to_arrow(Image, images),
        "solutions": to_arrow(Solutions, solutions),
    }
    human_and_truth = [to_arrow(Labels, rows.expert), to_arrow(Labels, rows.phantom)]
    labels = [to_arrow(Labels, rows.judge), pa.concat_tables(human_and_truth)]
    dataset = audit(
        AuditConfig(bootstrap_samples=50),
        questions=[tables["questions"]],
        images=[tables["images"]],
        solutions=[tables["solutions"]],
        labels={"judge_labels": labels[:1], "expert_labels": labels[1:]},
        review_queue=to_arrow(ReviewItem, rows.queue),
    )
    worth = {"balances": dataset.balance, "pairs": dataset.agreement}
    return {**tables, "scores": to_arrow(Scores, rows.scores), "labels": labels, **worth}
