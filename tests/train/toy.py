"""A toy study for the training stages: 12 questions, right steps say what the picture shows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image as Picture

from medmm_ray.data import records

FINDINGS = ("dark", "bright")


def questions(number: int = 12, split: str = "train") -> list[records.Question]:
    return [
        records.Question(
            question_id=f"q{i:02}", source="toy", split=split, modality="radiology", difficulty="easy",
            question="How does the picture look?", options=list(FINDINGS), answer="AB"[i % 2], answer_type="choice",
            image_ids=[f"im{i:02}"],
        )
        for i in range(number)
    ]  # fmt: skip


def images(folder: Path, number: int = 12) -> list[records.Image]:
    rows = []
    for i in range(number):
        uri = folder / f"im{i:02}.png"
        Picture.new("RGB", (32, 32), (220 if i % 2 else 30,) * 3).save(uri)
        rows.append(
            records.Image(
                image_id=f"im{i:02}", uri=str(uri), sha256=f"{i}", perceptual_hash="", width=32, height=32,
                split="train", modality="radiology", diagnosis=FINDINGS[i % 2], annotation="{}",
            )
        )  # fmt: skip
    return rows


def steps(finding: str) -> list[str]:
    return ["Look at the picture.", f"It is {finding}.", f"So the answer is ({'AB'[FINDINGS.index(finding)]})."]


def solutions(number: int = 12, policy: str = "worked", each: int = 2) -> list[records.Solutions]:
    """`each` solutions a question, the first half of them says dark, the second bright."""
    rows = []
    for i in range(number):
        own = []
        for j in range(each):
            says = steps(FINDINGS[2 * j // each])
            own.append(
                records.Solution(
                    solution_id=f"s{i:02}-{j}", index=j, text="", steps=says, answer="AB"[2 * j // each],
                    correct=2 * j // each == i % 2, finish_reason="stop", seed=j, text_sha=str(hash(tuple(says))),
                )
            )  # fmt: skip
        rows.append(
            records.Solutions(
                question_id=f"q{i:02}", policy=policy, config_hash="c", num_requested=each,
                solutions=own,
            )
        )  # fmt: skip
    return rows


def evidence(number: int = 12) -> list[records.Evidence]:
    return [
        records.Evidence(
            question_id=f"q{i:02}", config_hash="c", images=[],
            documents=[records.RetrievedDocument(document_id="d0", text="Bright pictures have much light.", score=1.0)],
        )
        for i in range(number)
    ]  # fmt: skip


def judge_labels(rows: list[records.Solutions]) -> list[records.Labels]:
    """The truth: the first step says nothing checkable, the others are right where the finding is."""
    made = []
    for row in rows:
        for solution in row.solutions:
            right = int(bool(solution.correct))
            made.append(
                records.Labels(
                    question_id=row.question_id, solution_id=solution.solution_id, source="judge", annotator="toy",
                    steps=[
                        records.StepLabel(confidence="high"),
                        records.StepLabel(label=right, confidence="high"),
                        records.StepLabel(label=right, confidence="high"),
                    ],
                    cost=0.0,
                )
            )  # fmt: skip
    return made


def table(record: type, rows: list[Any]) -> pa.Table:
    return records.to_arrow(record, rows)
