"""The text tower's pass over packed questions: rows filled to a budget of tokens, states taken at the tags.

Enters: packed questions, one after another. Leaves: for each branch the states after the final norm at its tags, and
the mean state of each step's tokens in the middle layer. Several questions share a row; a question larger than the
budget takes several rows, and its prefix is run once, its keys and values kept for the rows that follow.

Legend: L row length, P prefix length, T tags, D text width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Questions, each with its owner, as rows of at most `token_budget` tokens (a longer prefix or branch goes alone).

    Branches of a question go by length, so that those of like length meet.
    """
    row: list[Piece] = []
    used = 0
    for owner, packed in questions:
        branches = sorted(packed.branches, key=lambda b: -len(b.ids))
        prefix, total = len(packed.prefix_ids), packed.num_tokens
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


@dataclass
class _Places:
    """Where things stand in a row of pieces: its ids and positions, and for each tag its row and its step's rows."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each tag's step."""
    rows: list[int] = field(default_factory=list)
    """Rows of the branches that belong to a step, and …"""
    owners: list[int] = field(default_factory=list)
    """… the tag of that step."""
    ahead: list[tuple[int, Piece, int, int]] = field(default_factory=list)
    """Tags whose step starts in the prefix: tag, piece, the prefix's first row, the step's start."""

    def add(self, piece: Piece) -> None:
        prefix, begin = len(piece.packed.prefix_ids), len(self.ids)
        if piece.has_prefix:
            self.ids += piece.packed.prefix_ids
            self.positions += range(prefix)
        for branch in piece.branches:
            at = len(self.ids)
            for tag, (start, end) in zip(branch.tags, branch.spans(prefix), strict=True):
                own = range(at + max(start - prefix, 0), at + end - prefix)
                if start < prefix:
                    self.ahead.append((len(self.tags), piece, begin, start))
                self.rows += own
                self.owners += [len(self.tags)] * len(own)
                self.tags.append(at + tag)
                self.lengths.append(end - start)
            self.ids += branch.ids
            self.positions += range(prefix, prefix + len(branch.ids))


def read_row(text_model: Any, pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor]:
    """One pass: ``states_TD`` and ``summaries_TD`` of the tags of all branches of a row, in order; differentiable."""

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    places = _Places()
    for piece in pieces:
        places.add(piece)
    with _middle(text_model.base_model) as middle:
        output = text_model.base_model(
            input_ids=index(places.ids)[None],
            position_ids=index(places.positions)[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # the row says who sees whom
            shared_prefix=Row([piece.block for piece in pieces], device),
            use_cache=False,
        )
    states_TD, middle_LD = output.last_hidden_state[0, index(places.tags)], middle[0][0]
    sums_TD = torch.zeros_like(states_TD, dtype=torch.float32)
    sums_TD = sums_TD.index_add(0, index(places.owners), middle_LD[index(places.rows)].float())
    for piece in pieces:
        if piece.held is not None and piece.has_prefix:
            piece.held.middle_PD = middle_LD[: len(piece.packed.prefix_ids)].clone()
    if places.ahead:
        parts_AD = torch.stack([_ahead(middle_LD, piece, begin, start) for _, piece, begin, start in places.ahead])
        sums_TD = sums_TD.index_add(0, index([tag for tag, *_ in places.ahead]), parts_AD)
    return states_TD, (sums_TD / index(places.lengths)[:, None]).to(states_TD.dtype)


def _ahead(middle_LD: Tensor, piece: Piece, begin: int, start: int) -> Tensor:
    """The sum of the states [D, fp32] from `start` to the prefix's end, in this row or held from an earlier one."""
    if piece.has_prefix:
        part_KD = middle_LD[begin + start : begin + len(piece.packed.prefix_ids)]
    else:
        assert piece.held is not None
        assert piece.held.middle_PD is not None
        part_KD = piece.held.middle_PD[start:]
    return part_KD.float().sum(dim=0)


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
