"""The text tower's pass over packed questions: rows filled to a budget of tokens, states taken at the tags.

Enters: packed questions, one after another. Leaves: for each branch the states after the final norm at its tags, and
the mean state of each step's tokens in the middle layer. Several questions share a row; a question larger than the
budget takes several rows, and its prefix is run once, its keys and values kept for the rows that follow.

Legend: L row length, P prefix length, T tags, D text width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medmm_ray.engines.reward_model.attention import Block, Held, Row
from medmm_ray.engines.reward_model.packing import Branch, PackedQuestion


@dataclass
class HeldPrefix(Held):
    """A prefix for later rows: its keys and values, and its states in the middle layer [P, D]."""

    middle_PD: Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """What a row has of one question: the prefix (or, held from an earlier row, not), and some of the branches.

    `owner` is what came with the question; it finds its way back by it.
    """

    owner: Any
    packed: PackedQuestion
    branches: Sequence[Branch]
    has_prefix: bool
    held: HeldPrefix | None = None

    @property
    def block(self) -> Block:
        prefix = len(self.packed.prefix_ids) if self.has_prefix else 0
        return Block(prefix, tuple(len(b.ids) for b in self.branches), self.held)


def rows(questions: Iterable[tuple[Any, PackedQuestion]], token_budget: int) -> Iterator[list[Piece]]:
    """Questions, each with its owner, as rows of at most `token_budget` tokens each (a longer prefix or branch has a row to itself).

    Branches of a question go by length, so that those of like length meet.
    """
    row: list[Piece] = []
    used = 0
    for owner, packed in questions:
        branches = sorted(packed.branches, key=lambda b: -len(b.ids))
        prefix, total = len(packed.prefix_ids), packed.offsets[-1]
        if row and used + total > token_budget:
            yield row
            row, used = [], 0
        if total <= token_budget:
            row.append(Piece(owner, packed, branches, has_prefix=True))
            used += total
            continue
        held, has_prefix, used, own = HeldPrefix(), True, prefix, list[Branch]()
        for branch in branches:
            if (own or has_prefix) and used + len(branch.ids) > token_budget:
                yield [Piece(owner, packed, own, has_prefix, held)]
                has_prefix, used, own = False, 0, []
            own.append(branch)
            used += len(branch.ids)
        row = [Piece(owner, packed, own, has_prefix, held)]
    if row:
        yield row


def read_row(text_model: Any, pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor]:
    """One pass: ``states_TD`` and ``summaries_TD`` of the tags of all branches of a row, in order; differentiable."""
    ids: list[int] = []
    positions: list[int] = []
    tags: list[int] = []  # rows of the tags
    inside: list[int] = []  # rows that belong to a step, …
    owner: list[int] = []  # … and the tag of that step
    ahead: list[tuple[int, Piece, int, int]] = []  # tags whose step starts in the prefix: tag, piece, its row, start
    counts: list[int] = []
    for piece in pieces:
        prefix, begin = len(piece.packed.prefix_ids), len(ids)
        if piece.has_prefix:
            ids += piece.packed.prefix_ids
            positions += range(prefix)
        for branch in piece.branches:
            at = len(ids)
            for tag, (start, end) in zip(branch.tags, branch.spans(prefix), strict=True):
                own = range(at + max(start - prefix, 0), at + end - prefix)
                if start < prefix:
                    ahead.append((len(tags), piece, begin, start))
                inside += own
                owner += [len(tags)] * len(own)
                tags.append(at + tag)
                counts.append(end - start)
            ids += branch.ids
            positions += range(prefix, prefix + len(branch.ids))
    row = Row([piece.block for piece in pieces], device)
    long = {"dtype": torch.long, "device": device}
    with _middle(text_model.base_model) as middle:
        states_LD = text_model.base_model(
            input_ids=torch.tensor([ids], **long),
            position_ids=torch.tensor([positions], **long),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # `row` says who sees whom
            shared_prefix=row,
            use_cache=False,
        ).last_hidden_state[0]
    middle_LD = middle[0][0]
    states_TD = states_LD[torch.tensor(tags, **long)]
    sums_TD = torch.zeros_like(states_TD, dtype=torch.float32).index_add(
        0, torch.tensor(owner, **long), middle_LD[torch.tensor(inside, **long)].float()
    )
    for piece in pieces:
        if piece.held is not None and piece.has_prefix:
            piece.held.middle_PD = middle_LD[: len(piece.packed.prefix_ids)].clone()
    if ahead:
        parts_D = []
        for _, piece, begin, start in ahead:
            prefix = len(piece.packed.prefix_ids)
            if piece.has_prefix:
                part_KD = middle_LD[begin + start : begin + prefix]
            else:
                assert piece.held is not None and piece.held.middle_PD is not None
                part_KD = piece.held.middle_PD[start:]
            parts_D.append(part_KD.float().sum(dim=0))
        sums_TD = sums_TD.index_add(0, torch.tensor([tag for tag, *_ in ahead], **long), torch.stack(parts_D))
    counts_T1 = torch.tensor(counts, device=device)[:, None]
    return states_TD, (sums_TD / counts_T1).to(states_TD.dtype)


@contextmanager
def _middle(base: nn.Module) -> Iterator[list[Tensor]]:
    """Catch what enters the middle layer, without keeping every layer's states."""
    layers: Any = base.layers
    caught: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught[:] = [args[0]]

    handle = layers[len(layers) // 2].register_forward_pre_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()
