"""Med-PRM's procedure (arXiv 2506.11474) written out from its definition: nothing of `medmm_ray` is used here.

A raw solution becomes one line, each of its steps ends in the tag " ки"; the chat template makes the prompt, which is
tokenised with special tokens; at each tag the softmax of the logits of " +" and " -" is the step's probability.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

TAG, PLUS, MINUS = " ки", " +", " -"

SYSTEM_WITH_DOCUMENTS = (
    "You are an evaluator assessing the logicality and validity of the reasoning in each step of the given "
    "explanation. In order to support the evaluation, the relevant documents, the question, and the explanation are "
    "provided sequentially. If the reasoning contains errors, output - after that step. If the reasoning in a step is "
    "logical and valid, output + after that step. "
)
SYSTEM_WITHOUT_DOCUMENTS = (
    "You are an evaluator assessing the logicality and validity of the reasoning in each step of the given "
    "explanation. In order to support the evaluation, the question and the explanation are provided. If the reasoning "
    "contains errors, output - after that step. If the reasoning in a step is logical and valid, output + after that "
    "step."
)
SYSTEMS = (SYSTEM_WITH_DOCUMENTS, SYSTEM_WITHOUT_DOCUMENTS)


def processed(raw: str) -> str:
    """A raw solution with its tags: line breaks become spaces, text before "Step 1" stays in front without a tag, a
    solution without steps is one step."""
    line = " ".join(raw.split("\n"))
    starts = [found.start() for found in re.finditer("(## )?Step [0-9]+:", line)]
    if not starts:
        return f"{line.strip()}{TAG}" if line.strip() else ""
    parts = [line[: starts[0]].strip()] if line[: starts[0]].strip() else []
    for start, end in zip(starts, [*starts[1:], len(line)], strict=True):
        parts.append("".join(line[start:end].strip().split("## ")) + TAG)
    return " ".join(parts)


def numbered(steps: Sequence[str]) -> str:
    """A list of steps as the raw solution that it stands for."""
    return " ".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))


def messages(
    question: str, tagged: str, documents: Sequence[str] = (), system: str | None = None
) -> list[dict[str, str]]:
    """`tagged`: the solution with its tags; `documents` without their labels."""
    head = "".join(f"Document {number}: {text}\n\n" for number, text in enumerate(documents, 1))
    own = SYSTEM_WITH_DOCUMENTS if documents else SYSTEM_WITHOUT_DOCUMENTS
    return [
        {"role": "system", "content": own if system is None else system},
        {"role": "user", "content": f"{head}Question: {question}\n\nExplanation: {tagged}"},
    ]


def prompt_ids(
    tok: Any, question: str, tagged: str, documents: Sequence[str] = (), system: str | None = None
) -> list[int]:
    chat = messages(question, tagged, documents, system)
    text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tok(text, add_special_tokens=True)["input_ids"]
    return ids


@torch.no_grad()
def probs_at_tags(model: Any, tok: Any, ids: Sequence[int]) -> list[float]:
    """P(+) at every tag of one sequence, wherever it stands: with all logits, by the tag's id."""
    (tag,), (plus,), (minus,) = (tok(text, add_special_tokens=False)["input_ids"] for text in (TAG, PLUS, MINUS))
    logits = model(torch.tensor([list(ids)])).logits[0]
    places = [place for place, token in enumerate(ids) if token == tag]
    probs: list[float] = torch.softmax(logits[places][:, [plus, minus]], dim=-1)[:, 0].tolist()
    return probs


def probs(
    model: Any, tok: Any, question: str, tagged: str, documents: Sequence[str] = (), system: str | None = None
) -> list[float]:
    """P(+) at every tag of the prompt around a solution with its tags."""
    return probs_at_tags(model, tok, prompt_ids(tok, question, tagged, documents, system))
