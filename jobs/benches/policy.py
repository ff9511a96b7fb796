"""A policy that writes phantom solutions in the right form, trained in a minute in this process, without Ray."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medmm_ray.records import Question
from medmm_ray.sources.phantom import make_items
from medmm_ray.text import question_with_options
from medmm_ray.train.policy import SCHEMA, LlamaShape, PolicyConfig, PolicyStage, vocabulary_texts
from medmm_ray.train.schedule import epoch_batches


def phantom_questions(number: int, seed: int, split: str = "test") -> list[Question]:
    """Questions as ingest would make them, without their pictures."""
    return [
        Question(
            question_id=f"{split}-{index}", source="phantom", split=split, modality="radiology",
            difficulty=item.case.difficulty, question=item.question, options=list(item.options), answer=item.answer,
            answer_type="choice", image_ids=[],
        )
        for index, item in enumerate(make_items(seed, split, number))
    ]  # fmt: skip


def train_toy_policy(folder: Path, shape: LlamaShape, updates: int, seed: int = 0, batch_size: int = 16) -> str:
    """A small Llama after so many updates on worked solutions: it knows their form, not the answers."""
    rows = [
        {
            "question_id": f"train-{index}",
            "question": question_with_options(item.question, item.options),
            "answer_type": "choice",
            "solutions": [list(item.worked[0])],
        }
        for index, item in enumerate(make_items(seed, "train", 16 * batch_size))
    ]
    worked = pa.Table.from_pylist(rows, schema=SCHEMA)
    texts = pa.table({"text": pa.array(sorted(vocabulary_texts(worked, [])))})
    folder.mkdir(parents=True)
    inputs = {"worked": str(folder / "worked.parquet"), "texts": str(folder / "texts.parquet")}
    pq.write_table(worked, inputs["worked"])
    pq.write_table(texts, inputs["texts"])
    stage = PolicyStage(PolicyConfig(shape=shape, seed=seed), inputs, "cpu")
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=2e-3)
    batches = [
        batch for epoch in range(updates // 16 + 1) for batch in epoch_batches(stage.sizes, batch_size, seed, epoch)
    ]
    for batch in batches[:updates]:
        loss = stage.loss(batch, 0) / len(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    stage.save(folder, {})
    return str(folder)
