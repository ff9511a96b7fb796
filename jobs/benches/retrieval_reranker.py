"""A small cross-encoder, trained on pairs that nothing is measured on: where no published one is at hand.

It begins as the text encoder's own transformer with a new output, and learns to tell a question's document from the
others that the rankers give for it (a softmax over the candidates of each question).
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from jobs.benches.retrieval_sets import Topic
from medmm_ray.engines.checkpoints import resolve


def train_reranker(
    base: str,
    topics: Sequence[Topic],
    candidates: Mapping[str, Sequence[tuple[str, str]]],
    folder: Path,
    console: Console,
    max_tokens: int = 128,
    negatives: int = 3,
    batch_size: int = 8,
    learning_rate: float = 5e-5,
    seed: int = 0,
) -> None:
    """Train on `topics` with what was retrieved for each (document and text), and save to `folder`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    torch.manual_seed(seed)
    source = resolve(base)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    examples = _examples(topics, candidates, negatives, seed)
    num_updates = len(examples) // batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        weight_decay=0.01,
    )
    schedule = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, num_updates // 10, num_updates
    )
    model.train()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reranker", total=num_updates)
        for first in range(0, num_updates * batch_size, batch_size):
            batch = examples[first : first + batch_size]
            queries: list[str] = []
            passages: list[str] = []
            for query, texts in batch:
                queries += [query] * len(texts)
                passages += texts
            inputs = tokenizer(
                queries, passages, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt"
            )
            logits_BC = model(**inputs).logits.view(len(batch), 1 + negatives)
            # The right one comes first in each.
            loss = torch.nn.functional.cross_entropy(logits_BC, torch.zeros(len(batch), dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(
                task,
                advance=1,
                description=f"reranker, loss {loss.item():.3f}",
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _examples(
    topics: Sequence[Topic], candidates: Mapping[str, Sequence[tuple[str, str]]], negatives: int, seed: int
) -> list[tuple[str, list[str]]]:
    """A query with a passage of its document and some of others; topics whose document was not retrieved have none."""
    rng = random.Random(seed)
    examples: list[tuple[str, list[str]]] = []
    for topic in topics:
        of_topic = candidates[topic.topic_id]
        right: list[str] = []
        wrong: list[str] = []
        for document_id, text in of_topic:
            side = right if document_id in topic.relevant else wrong
            side.append(text)
        if right and len(wrong) >= negatives:
            examples.append((topic.text, [right[0], *rng.sample(wrong, negatives)]))
    rng.shuffle(examples)
    return examples
