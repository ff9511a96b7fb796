"""Exact shared-prefix packing: many solutions of one question as one prefix and its branches.

Enters: a question (its options in the text), solutions as lists of steps (or raw text), documents in rank order, and
the tokenizer. Leaves: a `PackedQuestion`. Every full sequence is tokenised as the reference does it (Med-PRM: chat
template to text, then tokenised with special tokens), so its ids are exactly ``prefix_ids + branch.ids``; later tokens
than the last tag are cut, as they cannot influence a causal score.

Tags are found by token id and by their count in the text: one in the question, in a document, or inside a step ends no
step.

Legend: L packed length, P prefix length, T tags of all branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from medmm_ray.prompts import prm_messages
from medmm_ray.text import TAG, split_steps, tag_steps

Fit = Literal["skip", "break"]
MAX_LENGTH = 4096  # tokens; Med-PRM's
RESERVE = 1024  # tokens kept free of documents, for system prompt, question and solution; Med-PRM's


@dataclass(frozen=True)
class Branch:
    """One solution after the shared prefix.

    `solution` is its index in the list that was packed, `ids` end with the last step's tag. `tags` are the indices of
    the steps' tags in `ids`; `start` is where the solution's own text starts, counted from the start of the full
    sequence: it does not depend on how much is shared.
    """

    solution: int
    ids: list[int]
    tags: list[int]
    start: int

    def spans(self, prefix: int) -> list[tuple[int, int]]:
        """Each step's tokens, its tag left out, as [start, end) counted in the full sequence, `prefix` tokens ahead."""
        spans, start = [], self.start
        for tag in self.tags:
            spans.append((min(start, prefix + tag - 1), prefix + tag))
            start = prefix + tag + 1
        return spans


@dataclass(frozen=True)
class PackedQuestion:
    """A question's solutions as one row: the prefix, then the branches one after another.

    `errors` has one entry a solution: None, or ``kind: message`` for one that could not be packed (it has no branch).
    `num_documents` of the offered documents fitted. Tags are numbered over all branches in order.
    """

    prefix_ids: list[int]
    branches: list[Branch]
    errors: list[str | None]
    num_documents: int

    @cached_property
    def offsets(self) -> list[int]:
        """Where each branch starts in the packed row; one entry more than branches, the row's length."""
        return list(accumulate((len(b.ids) for b in self.branches), initial=len(self.prefix_ids)))

    @property
    def ids(self) -> list[int]:
        """Token ids of the packed row [L]."""
        return self.prefix_ids + [i for b in self.branches for i in b.ids]

    @property
    def positions(self) -> list[int]:
        """Position ids of the packed row [L]: each branch continues the prefix."""
        prefix = len(self.prefix_ids)
        return [*range(prefix), *(p for b in self.branches for p in range(prefix, prefix + len(b.ids)))]

    @property
    def tag_positions(self) -> list[int]:
        """Index of each tag in the packed row [T]."""
        return [o + t for o, b in zip(self.offsets, self.branches, strict=False) for t in b.tags]

    @property
    def tag_solutions(self) -> list[int]:
        """The solution of each tag [T]."""
        return [b.solution for b in self.branches for _ in b.tags]

    @property
    def tag_steps(self) -> list[int]:
        """The step, from 0, of each tag [T]."""
        return [step for b in self.branches for step in range(len(b.tags))]

    @property
    def step_rows(self) -> list[list[int]]:
        """The rows of the packed row that hold each tag's step, tag left out [T]."""
        prefix = len(self.prefix_ids)
        rows = []
        for offset, branch in zip(self.offsets, self.branches, strict=False):
            for start, end in branch.spans(prefix):
                rows.append([p if p < prefix else p - prefix + offset for p in range(start, end)])
        return rows

    @property
    def num_tokens_apart(self) -> int:
        """Tokens that scoring one by one would have run (up to the last tags)."""
        return sum(len(self.prefix_ids) + len(b.ids) for b in self.branches)


def choose_documents(
    tokenizer: Any,
    documents: Sequence[str],
    max_length: int = MAX_LENGTH,
    reserve: int = RESERVE,
    fit: Fit = "skip",
) -> list[str]:
    """Whole documents, in rank order, within ``max_length - reserve`` tokens.

    The choice depends on the question's documents alone, never on a solution. A document that does not fit is left
    out; with ``fit="break"`` (the reference's rule) it also ends the choice.
    """
    kept, free = [], max_length - reserve
    for document in documents:
        cost = len(tokenizer(document, add_special_tokens=False)["input_ids"]) + 1
        if cost <= free:
            kept.append(document)
            free -= cost
        elif fit == "break":
            break
    return kept


def read_solution(solution: str | Sequence[str]) -> tuple[str, list[str]]:
    """A solution as (preamble, steps): raw text is split at its "Step i:" marks, tags that it has already are taken
    off; a list is taken as it is."""
    if not isinstance(solution, str):
        return "", list(solution)
    preamble, steps = split_steps(solution)
    return preamble, [step.removesuffix(TAG) for step in steps]


def pack(
    tokenizer: Any,
    question: str,
    solutions: Sequence[str | Sequence[str]],
    documents: Sequence[str] = (),
    max_length: int = MAX_LENGTH,
    reserve: int = RESERVE,
    context: int | None = None,
    fit: Fit = "skip",
    training: bool = False,
) -> PackedQuestion:
    """Pack one question's solutions.

    Args:
        tokenizer: a fast tokenizer with a chat template in which `TAG` is one token.
        question: with its options, as `text.question_with_options` writes it.
        solutions: each a list of steps, or raw text.
        max_length, reserve, fit: the documents' budget, see `choose_documents`.
        context: tokens a full sequence may have; a longer one gets an error (default `max_length`).
        training: the reference's training prompt, which differs by a space.
    """
    kept = choose_documents(tokenizer, documents, max_length, reserve, fit)
    tag_id = single_id(tokenizer, TAG)
    limit = context or max_length
    errors: list[str | None] = [None] * len(solutions)
    read = [read_solution(s) for s in solutions]
    for i, (_, steps) in enumerate(read):
        if not any(step.strip() for step in steps):
            errors[i] = "no_steps: the solution is empty; expected at least one step of text"
    sound = [i for i, error in enumerate(errors) if error is None]
    if not sound:
        return PackedQuestion([], [], errors, len(kept))

    tagged = [tag_steps(read[i][1], read[i][0], TAG) for i in sound]
    texts = [_render(tokenizer, question, t, kept, training) for t in tagged]
    cuts = [text.rfind(t) for text, t in zip(texts, tagged, strict=True)]
    if min(cuts) < 0:
        raise ValueError("the tokenizer's chat template alters the solution's text; expected it to be kept as it is")
    head_ids = _tokenise(tokenizer, [texts[0][: cuts[0]]])[0]

    whole: list[tuple[int, list[int], list[int], int]] = []  # solution, ids, tags, start; all from the sequence's start
    for i, text, text_tagged, ids in zip(sound, texts, tagged, _tokenise(tokenizer, texts), strict=True):
        at = [p for p, token in enumerate(ids) if token == tag_id]
        if len(at) != text.count(TAG):
            errors[i] = f"tags: {len(at)} tag tokens for {text.count(TAG)} tags in the text; expected as many"
            continue
        own = at[len(at) - text_tagged.count(TAG) :]
        steps, preamble = read[i][1], read[i][0]
        tags = [own[tag_steps(steps[:n], preamble, TAG).count(TAG) - 1] for n in range(1, len(steps) + 1)]
        if tags[-1] >= limit:
            errors[i] = f"too_long: {tags[-1] + 1} tokens with {len(kept)} documents; the limit is {limit}"
            continue
        whole.append((i, ids[: tags[-1] + 1], tags, _common([head_ids, ids])))
    if not whole:
        return PackedQuestion([], [], errors, len(kept))

    # Every tag belongs to a branch, so the prefix ends before the first one.
    prefix = min(_common([ids for _, ids, _, _ in whole]), *(tags[0] for _, _, tags, _ in whole))
    branches = [Branch(i, ids[prefix:], [t - prefix for t in tags], start) for i, ids, tags, start in whole]
    return PackedQuestion(whole[0][1][:prefix], branches, errors, len(kept))


def attention_mask(packed: PackedQuestion) -> Tensor:
    """Who may look at whom in the packed row: bool [L, L], causal, and no branch sees another."""
    prefix, length = len(packed.prefix_ids), packed.offsets[-1]
    branch_L = torch.zeros(length, dtype=torch.long)
    for number, (start, end) in enumerate(zip(packed.offsets, packed.offsets[1:], strict=False), 1):
        branch_L[start:end] = number
    seen_LL = torch.ones(length, length, dtype=torch.bool).tril()
    same_LL = branch_L[:, None] == branch_L[None, :]
    same_LL[:, :prefix] = True
    return seen_LL & same_LL


def single_id(tokenizer: Any, text: str) -> int:
    """The id of a text that must be one token; a `ValueError` says where it is not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the tokenizer encodes {text!r} as {len(ids)} tokens {ids}; a reward model needs one id")
    return int(ids[0])


def _render(tokenizer: Any, question: str, tagged: str, documents: Sequence[str], training: bool) -> str:
    messages = prm_messages(question, tagged, documents, training=training)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"]
    return rows


def _common(rows: Sequence[list[int]]) -> int:
    """Length of the longest common prefix."""
    low, high = min(rows), max(rows)  # the first and last in order differ the earliest
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
