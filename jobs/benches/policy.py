"""A policy that writes phantom solutions in the right form, trained in a minute."""

from typing import Any

import pyarrow as pa

from medmm_ray.data.records import Question
from medmm_ray.data.sources.phantom import make_questions
from medmm_ray.session import session
from medmm_ray.text import question_with_options
from medmm_ray.train.launch import fit
from medmm_ray.train.policy import SCHEMA, PolicyConfig, PolicyStage, vocabulary_texts


def phantom_questions(number: int, seed: int, split: str = "test") -> list[Question]:
    """Questions as ingest would make them, without their images."""
    questions: list[Question] = []
    for index, item in enumerate(make_questions(seed, split, number)):
        question = Question(
            question_id=f"{split}-{index}",
            source="phantom",
            split=split,
            modality="radiology",
            difficulty=item.case.difficulty,
            question=item.question,
            options=list(item.options),
            answer=item.answer,
            answer_type="choice",
            image_ids=[],
        )
        questions.append(question)
    return questions


def train_toy_policy(folder: str, config: PolicyConfig, questions: int = 256) -> str:
    """Leave a small Llama that was trained on worked solutions in `folder`: it knows their form, not the answers."""
    rows: list[dict[str, Any]] = []
    for index, item in enumerate(make_questions(config.seed, "train", questions)):
        rows.append(
            {
                "question_id": f"train-{index}",
                "question": question_with_options(item.question, item.options),
                "answer_type": "choice",
                "solutions": [list(item.worked[0])],
            }
        )
    worked = pa.Table.from_pylist(rows, schema=SCHEMA)
    texts = pa.table({"text": pa.array(sorted(vocabulary_texts(worked, [])))})
    with session():
        fit(PolicyStage, config, {"worked": worked, "texts": texts}, {}, folder, "toy-policy")
    return folder
