"""The text tower's pass over packed questions: rows filled to a budget of tokens, states taken at the tags.

Enters: packed questions, one after another. Leaves: for each branch the states after the final norm at its tags, and
the mean state of each step's tokens in the middle layer. Several questions share a row; a question larger than the
budget takes several rows, and its prefix is run once (in pieces, where it is larger itself), its keys and values kept
for the rows that follow.

Legend: L row length, P prefix length, T tags, I rows of an image, D text width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medmm_ray.reward_model.attention import Block, PackedRow, PrefixKeyValues
from medmm_ray.reward_model.packing import Branch, PackedQuestion


@dataclass
class CachedPrefix(PrefixKeyValues):
    """A prefix for later rows: its keys and values, and its states in the middle layer, row by row [P, D]."""

    middle_PD: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class RowPiece:
    """What a row has of one question: the prefix from `start` on (its beginning is held from earlier rows) up to
    `stop`, and some of the branches.

    `job` is what came with the question; it finds its way back by it.
    """

    job: Any
    packed: PackedQuestion
    branches: Sequence[Branch]
    start: int
    stop: int
    cached: CachedPrefix | None = None

    @classmethod
    def whole(cls, job: Any, packed: PackedQuestion, branches: Sequence[Branch]) -> "RowPiece":
        return cls(job, packed, branches, 0, len(packed.prefix_ids))

    @property
    def block(self) -> Block:
        return Block(self.stop - self.start, tuple(len(b.ids) for b in self.branches), self.cached)


def pack_rows(questions: Iterable[tuple[Any, PackedQuestion]], token_budget: int) -> Iterator[list[RowPiece]]:
    """Questions, each with its job, as rows of at most `token_budget` tokens (a longer branch goes alone).

    Branches of a question go by length, so that those of like length meet.
    """
    row: list[RowPiece] = []
    used = 0
    for job, packed in questions:
        branches = sorted(packed.branches, key=lambda b: -len(b.ids))
        if row and used + packed.num_tokens > token_budget:
            yield row
            row, used = [], 0
        if packed.num_tokens <= token_budget:
            row.append(RowPiece.whole(job, packed, branches))
            used += packed.num_tokens
        else:
            *full, last = _pieces(job, packed, branches, token_budget)
            yield from ([piece] for piece in full)
            row, used = [last], last.block.length
    if row:
        yield row


def _pieces(job: Any, packed: PackedQuestion, branches: Sequence[Branch], token_budget: int) -> Iterator[RowPiece]:
    """One question, larger than the budget: as much of the prefix as fits a piece, then as many branches."""
    held, prefix, start = CachedPrefix(), len(packed.prefix_ids), 0
    while prefix - start > token_budget:
        yield RowPiece(job, packed, [], start, start + token_budget, held)
        start += token_budget
    used, own = prefix - start, list[Branch]()
    for branch in branches:
        if used and used + len(branch.ids) > token_budget:
            yield RowPiece(job, packed, own, start, prefix, held)
            start, used, own = prefix, 0, []
        own.append(branch)
        used += len(branch.ids)
    yield RowPiece(job, packed, own, start, prefix, held)


@dataclass
class RowLayout:
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
    ahead: list[tuple[int, RowPiece, int, int]] = field(default_factory=list)
    """Tags whose step starts in the prefix: tag, piece, the prefix's first row, the step's start."""
    images: list[tuple[RowPiece, int]] = field(default_factory=list)
    """Prefixes, or parts of them, in which images stand, and their first row."""

    def add(self, piece: RowPiece) -> None:
        prefix, begin = len(piece.packed.prefix_ids), len(self.ids)
        self.ids += piece.packed.prefix_ids[piece.start : piece.stop]
        self.positions += range(piece.start, piece.stop)
        if piece.packed.image_embeddings is not None and piece.stop > piece.start:
            self.images.append((piece, begin))
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


def forward_row(text_model: Any, pieces: Sequence[RowPiece], device: torch.device) -> tuple[Tensor, Tensor]:
    """One pass: ``states_TD`` and ``summaries_TD`` of the tags of all branches of a row, in order; differentiable."""

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    places = RowLayout()
    for piece in pieces:
        places.add(piece)
    ids_L = index(places.ids)
    embeddings_LD = text_model.get_input_embeddings()(ids_L)
    for piece, begin in places.images:
        assert piece.packed.image_embeddings is not None
        token = text_model.config.image_token_id
        at_I = begin + (ids_L[begin : begin + piece.stop - piece.start] == token).nonzero()[:, 0]
        first = piece.packed.prefix_ids[: piece.start].count(token)  # in an earlier part of the prefix
        rows_ID = piece.packed.image_embeddings.rows_ID[first : first + len(at_I)]
        embeddings_LD = embeddings_LD.index_copy(0, at_I, rows_ID.to(embeddings_LD))
    decoder = text_model.get_decoder()
    tags_T = index(places.tags)
    row = PackedRow([piece.block for piece in pieces], device)
    with _middle(decoder) as middle, _last_layer_at(decoder, row, places.tags, tags_T):
        output = decoder(
            inputs_embeds=embeddings_LD[None],
            position_ids=index(places.positions)[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # the row says who sees whom
            shared_prefix=row,
            use_cache=False,
        )
    states_TD, middle_LD = output.last_hidden_state[0, tags_T], middle[0][0]
    sums_TD = torch.zeros_like(states_TD, dtype=torch.float32)
    sums_TD = sums_TD.index_add(0, index(places.owners), middle_LD[index(places.rows)].float())
    for piece in pieces:
        if piece.cached is not None and piece.stop > piece.start:
            piece.cached.middle_PD.append(middle_LD[: piece.stop - piece.start].clone())
    if places.ahead:
        parts_AD = torch.stack([_ahead(middle_LD, piece, begin, start) for _, piece, begin, start in places.ahead])
        sums_TD = sums_TD.index_add(0, index([tag for tag, *_ in places.ahead]), parts_AD)
    return states_TD, (sums_TD / index(places.lengths)[:, None]).to(states_TD.dtype)


def _ahead(middle_LD: Tensor, piece: RowPiece, begin: int, start: int) -> Tensor:
    """The sum of the states [D, fp32] from `start` to the prefix's end, of which earlier rows may hold a part."""
    if piece.cached is None:
        part_KD = middle_LD[begin + start : begin + piece.stop]
    else:
        part_KD = torch.cat(piece.cached.middle_PD)[start:]
    return part_KD.float().sum(dim=0)


@contextmanager
def _middle(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Catch what enters the middle layer, without keeping every layer's states."""
    layers: Any = decoder.layers
    caught: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught[:] = [args[0]]

    handle = layers[len(layers) // 2].register_forward_pre_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def _last_layer_at(decoder: nn.Module, row: PackedRow, tags: Sequence[int], tags_T: Tensor) -> Iterator[None]:
    """Compute of the last layer only what reaches the states at the tags: their queries and their MLP, all keys and
    values. Its other rows come out wrong, and nothing reads them.

    One layer's worth of work in `num_layers`, nearly whole. Not with a gradient: activation checkpointing would run the
    layer once more, without this.
    """
    if torch.is_grad_enabled():
        yield
        return
    row.restrict_last_layer(tags)
    layers: Any = decoder.layers

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, tags_T], *args[1:])

    def scatter(_: nn.Module, __: tuple[Tensor, ...], output_1TD: Tensor) -> Tensor:
        output_1LD = output_1TD.new_zeros(1, row.length, output_1TD.shape[-1])
        return output_1LD.index_copy_(1, tags_T, output_1TD)

    handles = [layers[-1].mlp.register_forward_pre_hook(gather), layers[-1].mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
