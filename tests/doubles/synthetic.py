"""The tables of a made-up run: drawn pictures, questions on them, solutions, scores and labels.

The multimodal scorer knows the picture (with some noise), the text-only one does not; `run` is deterministic.
"""

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
    "Both lungs are clear & fully expanded (no \"<b>\" sign).",
)  # fmt: skip
TEMPLATES = ("What does this film show?", "Which finding explains the complaint?", "Which of these is present?")


def draw(finding: int, seed: int) -> Picture.Image:
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


def run(folder: Path, num_questions: int = 40, num_samples: int = 16, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `evaluate`: the last question has no solutions, one solution of the first has no scores."""
    rng = np.random.default_rng(seed)
    questions, images, solutions, scores = [], [], [], []
    judge, phantom, expert, queue = [], [], [], []
    for number in range(num_questions):
        finding = int(rng.integers(4))
        image_id = f"im{number:04d}"
        path = folder / f"{image_id}.png"
        draw(finding, number).save(path)
        images.append(
            Image(image_id=image_id, uri=str(path), sha256="", perceptual_hash="", width=80, height=80, split="test",
                  modality="radiology", diagnosis=FINDINGS[finding], annotation="{}")
        )  # fmt: skip
        question_id = f"q{number:04d}"
        questions.append(
            Question(question_id=question_id, source="phantom", split="test",
                     modality="radiology", difficulty=("easy", "medium", "hard")[number % 3],
                     question=TEMPLATES[number % 3], options=list(FINDINGS), answer="ABCD"[finding],
                     answer_type="choice", image_ids=[image_id])
        )  # fmt: skip
        made = []
        seen = finding if rng.random() > 0.08 else int(rng.integers(4))  # what the scorer takes the picture for
        for index in range(num_samples if number < num_questions - 1 else 0):
            said = int(rng.choice(4, p=(0.4, 0.2, 0.15, 0.25)))
            steps = [
                "The film is a frontal view.",
                SIGNS[said],
                f"This sign means {FINDINGS[said]}.",
                f"So the answer is ({'ABCD'[said]}).",
            ]
            true = [None, int(said == finding), int(said == finding), int(said == finding)]
            solution_id = f"s{digest(question_id, index)}"
            answered = rng.random() > 0.03
            made.append(
                Solution(solution_id=solution_id, index=index, text=" ".join(steps), steps=steps,
                         answer="ABCD"[said] if answered else None, correct=said == finding if answered else None,
                         finish_reason="stop", seed=index, text_sha="")
            )  # fmt: skip
            text = rng.normal((1.2, 0.3, 0.1, -0.1), 0.6)
            gaze = rng.normal([0.1, *[2.6 if said == seen else -2.6] * 3], 1.6)
            stray = rng.normal([0.1, 0, 0, 0], 2.5)
            failed = number == 0 and index == 0
            for arm, image in (("text_only", 0 * gaze), ("multimodal", gaze), ("shuffled_image", stray)):
                scores.append(
                    Scores(question_id=question_id, solution_id=solution_id, model="m", arm=arm,
                           text_log_odds=[] if failed else text.tolist(),
                           image_log_odds=[] if failed else image.tolist(),
                           error="image_corrupt: im0000" if failed else None)
                )  # fmt: skip
            flip = [y if y is None or rng.random() > 0.08 else 1 - y for y in true]
            own: dict[str, Any] = {"question_id": question_id, "solution_id": solution_id, "cost": 0.0001}
            judge.append(Labels(**own, source="judge", annotator="j", steps=[StepLabel(label=y) for y in flip]))
            phantom.append(Labels(**own, source="phantom", annotator="truth", steps=[StepLabel(label=y) for y in true]))
            if index == 1:
                steps_read = [StepLabel(label=true[i] if i == 1 else None) for i in range(4)]
                expert.append(Labels(**own, source="expert", annotator="reader", steps=steps_read))
                queue.append(
                    ReviewItem(question_id=question_id, solution_id=solution_id, step_index=1, stratum="easy",
                               inclusion_probability=0.25)
                )  # fmt: skip
        solutions.append(
            Solutions(question_id=question_id, policy="p", config_hash="c", num_requested=num_samples,
                      solutions=made, error=None if made else "engine: died")
        )  # fmt: skip
    tables = {
        "questions": to_arrow(Question, questions),
        "images": to_arrow(Image, images),
        "solutions": to_arrow(Solutions, solutions),
    }
    labels = [to_arrow(Labels, judge), pa.concat_tables([to_arrow(Labels, expert), to_arrow(Labels, phantom)])]
    dataset = audit(
        AuditConfig(bootstrap_samples=50),
        **{**tables, "solutions": [tables["solutions"]]},
        labels={"judge_labels": labels[:1], "expert_labels": labels[1:]},
        review_queue=to_arrow(ReviewItem, queue),
    )
    return {**tables, "scores": to_arrow(Scores, scores), "labels": labels, "dataset": dataset}
