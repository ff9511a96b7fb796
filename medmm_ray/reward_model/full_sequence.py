"""One question and one solution of it, written out as ids: what a family makes, and packing shares the beginning of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Solution = str | Sequence[str]  # raw text, which a family cuts into steps, or a list of steps


@dataclass(frozen=True)
class QuestionContext:
    """What stands before every solution of a question: it is their shared prefix, as a family writes it."""

    question: str
    documents: Sequence[str] = ()
    images: Sequence[int] = ()
    """Embeddings of each image, in number; for a language model that reads images itself."""
    training: bool = False
    """The reference's training prompt, which differs by a space."""
    system: str | None = None
    """A system prompt in the place of the family's own."""


@dataclass(frozen=True)
class FullSequence:
    """One solution written out up to the token at which its last step is read.

    `tags` are the places at which its steps are read; `start` is where its own text starts.
    """

    solution: int
    ids: list[int]
    tags: list[int]
    start: int


def single_id(tokenizer: Any, text: str) -> int:
    """The id of a text that must be one token; a `ValueError` says where it is not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the tokenizer encodes {text!r} as {len(ids)} tokens {ids}; a reward model needs one id")
    return int(ids[0])


def common_prefix(sequences: Sequence[Any]) -> int:
    """Length of the longest common beginning, of lists of ids or of texts."""
    # Of all pairs the first and the last in order differ the earliest.
    first, last = min(sequences), max(sequences)
    # Whole parts are compared, in C, and halved: there are thousands of ids, and 64 solutions.
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
