"""The tables of a phantom run up to the review queue, without running the steps before it."""

from pathlib import Path
from typing import Any

from jobs.graph import MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import digest
from medmm_ray.data.records import (
    Document,
    Evidence,
    Image,
    Question,
    RetrievedDocument,
    RetrievedImage,
    ReviewItem,
    Solution,
    Solutions,
)
from medmm_ray.data.sources.phantom import DOCUMENTS, blind_solution, generator, make_questions, render

RECIPE = "jobs/recipes/tiny.yaml"
REFERENCES = 3


def make_run(
    folder: Path, num_questions: int = 4, size: int = 96, steps: tuple[int, ...] = (1, 2), **lists: Any
) -> Run:
    """A run in `folder`; steps of each question's first solution are in the queue. `lists` replace tables' rows."""
    run = Run(load_recipe([RECIPE, f"run={folder}", "review.expert=none"]))
    folder.mkdir(exist_ok=True)
    items = make_questions(0, "train", num_questions + REFERENCES, 1)
    questions, images, evidence, solutions, queue = [], [], [], [], []
    for number, item in enumerate(items):
        image_id = f"im{number}"
        path = folder / f"{image_id}.png"
        render(item.case, size).save(path)
        images.append(
            Image(image_id=image_id, uri=str(path), sha256="", perceptual_hash="", width=size, height=size,
                  split="train", modality="radiology", diagnosis=item.case.diagnosis, annotation=item.case.annotation())
        )  # fmt: skip
    documents = [
        Document(document_id=f"d{number}", corpus=d.corpus, title=d.title, text=d.text)
        for number, d in enumerate(DOCUMENTS[:4])
    ]
    for number, item in enumerate(items[:num_questions]):
        question_id = f"q{number}"
        questions.append(
            Question(question_id=question_id, source="phantom", split="train", modality="radiology",
                     difficulty=item.case.difficulty, question=item.question, options=list(item.options),
                     answer=item.answer, answer_type="choice", image_ids=[f"im{number}"])
        )  # fmt: skip
        evidence.append(
            Evidence(
                question_id=question_id,
                config_hash="c",
                documents=[RetrievedDocument(document_id=d.document_id, text=d.text, score=1.0) for d in documents],
                images=[
                    RetrievedImage(image_id=i.image_id, uri=i.uri, diagnosis=i.diagnosis, similarity=0.9)
                    for i in images[num_questions:]
                ],
            )
        )
        made = []
        for index in range(2):
            texts, letter = blind_solution(item, generator("review", number, index))
            made.append(
                Solution(solution_id=f"s{number}-{index}", index=index, text=" ".join(texts), steps=texts,
                         answer=letter, correct=letter == item.answer, finish_reason="stop", seed=0,
                         text_sha=digest(texts))
            )  # fmt: skip
        solutions.append(
            Solutions(question_id=question_id, policy="p", config_hash="c", num_requested=2,
                      solutions=made)
        )  # fmt: skip
        queue += [
            ReviewItem(question_id=question_id, solution_id=f"s{number}-0", step_index=index,
                       stratum="easy/radiology/sure", inclusion_probability=0.5)
            for index in steps
        ]  # fmt: skip
    rows = {
        "questions": (questions, "question_id"),
        "images": (images, "image_id"),
        "documents": (documents, "document_id"),
        "evidence": (evidence, "question_id"),
        "solutions": (solutions, "question_id"),
        "review_queue": (queue, "question_id"),
        "judge_labels": ([], "question_id"),
        "monte_carlo_labels": ([], "question_id"),
    }
    for name, (content, key) in rows.items():
        Job(run, MAKER[name]).make_rows(name, lists.get(name, content), key)
    return run
