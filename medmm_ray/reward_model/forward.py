"""The text tower's forward pass over packed questions: rows filled to a budget of tokens, states taken at the tags.

Enters: packed questions, one after another. Leaves: for each branch the states after the final norm at its tags, and
the mean state of each step's tokens in the middle layer. Several questions share a row; a question larger than the
budget takes several rows, and its prefix is run once (in pieces, where it is larger itself), its keys and values cached
for the rows that follow.

Legend: L row length, P prefix length, T tags, I embeddings of images, D text width.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medmm_ray.reward_model.attention import Block, PackedRow, PrefixKeyValues
from medmm_ray.reward_model.packing import Branch, PackedQuestion

# Hooks are the module's, whoever calls it: two threads' passes would take each other's states.
_ONE_PASS = threading.Lock()


@dataclass
class CachedPrefix(PrefixKeyValues):
    """A prefix for later rows: its keys and values, and its states in the middle layer, row by row [P, D]."""

    middle_PD: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class RowPiece:
    """What a row has of one question: the prefix from `start` to `stop` (what is before `start` is cached), and some of
    the branches.

    `job` is what the question came with, handed back with its states.
    """

    job: Any
    packed: PackedQuestion
    branches: Sequence[Branch]
    start: int
    stop: int
    cached: CachedPrefix | None = None

    @classmethod
    def whole(cls, job: Any, packed: PackedQuestion, branches: Sequence[Branch]) -> "RowPiece":
        """A question that fits a row: all of its prefix, and nothing cached."""
        return cls(job, packed, branches, 0, len(packed.prefix_ids))

    @property
    def has_prefix(self) -> bool:
        """Whether any of the prefix's tokens are in this row."""
        return self.stop > self.start

    @property
    def num_tokens(self) -> int:
        """Its tokens in the row."""
        return self.stop - self.start + sum(len(branch.ids) for branch in self.branches)

    @property
    def block(self) -> Block:
        """Its lengths, as the attention needs them."""
        lengths = tuple(len(branch.ids) for branch in self.branches)
        return Block(self.stop - self.start, lengths, self.cached)


class RowPacker:
    """Fills rows of at most `token_budget` tokens with questions; a branch that is longer gets a row of its own.

    Branches of a question go by length, so that those of like length meet in a batch.
    """

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self._row: list[RowPiece] = []
        self._used = 0

    def add(self, job: Any, packed: PackedQuestion) -> list[list[RowPiece]]:
        """Take a question in; gives the rows that are full with it, in order."""
        # Stable, so that equal lengths keep their order and a rerun packs the same rows.
        branches = sorted(packed.branches, key=lambda branch: -len(branch.ids))
        rows: list[list[RowPiece]] = []
        if self._used + packed.num_tokens > self.token_budget:
            rows += self.flush()
        if packed.num_tokens <= self.token_budget:
            self._row.append(RowPiece.whole(job, packed, branches))
            self._used += packed.num_tokens
        else:
            *full, last = _split(job, packed, branches, self.token_budget)
            rows += [[piece] for piece in full]
            self._row, self._used = [last], last.block.length
        return rows

    def flush(self) -> list[list[RowPiece]]:
        """The row that is not full yet, where there is one."""
        rows = [self._row] if self._row else []
        self._row, self._used = [], 0
        return rows


def _split(job: Any, packed: PackedQuestion, branches: Sequence[Branch], token_budget: int) -> Iterator[RowPiece]:
    """One question, larger than the budget: as much of the prefix as fits a piece, then as many branches."""
    # One cache for all pieces: each adds its part of the prefix, and later ones attend to what is there.
    cached, prefix, start = CachedPrefix(), len(packed.prefix_ids), 0
    while prefix - start > token_budget:
        yield RowPiece(job, packed, [], start, start + token_budget, cached)
        start += token_budget
    used = prefix - start
    in_piece: list[Branch] = []
    for branch in branches:
        if used and used + len(branch.ids) > token_budget:
            yield RowPiece(job, packed, in_piece, start, prefix, cached)
            start, used, in_piece = prefix, 0, []
        in_piece.append(branch)
        used += len(branch.ids)
    yield RowPiece(job, packed, in_piece, start, prefix, cached)


@dataclass(frozen=True)
class _SplitStep:
    """A step that starts in the prefix and ends in a branch: its tag's number, its piece, where the piece stands in the
    row, and the step's first token in the full sequence."""

    tag: int
    piece: RowPiece
    offset: int
    start: int

    def prefix_sum(self, middle_LD: Tensor) -> Tensor:
        """The sum of the middle states [D, fp32] of its tokens in the prefix, of which earlier rows may have a part."""
        if self.piece.cached is None:
            part_PD = middle_LD[self.offset + self.start : self.offset + self.piece.stop]
        else:
            part_PD = torch.cat(self.piece.cached.middle_PD)[self.start :]
        return part_PD.float().sum(dim=0)


@dataclass
class RowLayout:
    """Where things stand in a row of pieces: its ids and positions, and for each tag its index and its step's tokens.

    Step `step_of_token[i]` has the token `step_tokens[i]` of the row: the part of it that lies in a branch.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    step_lengths: list[int] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_of_token: list[int] = field(default_factory=list)
    split_steps: list[_SplitStep] = field(default_factory=list)
    images: list[tuple[RowPiece, int]] = field(default_factory=list)
    """Pieces with images in their part of the prefix, and where they stand in the row."""

    @classmethod
    def of(cls, pieces: Sequence[RowPiece]) -> "RowLayout":
        """The layout of a row of pieces, one behind the other."""
        layout = cls()
        for piece in pieces:
            layout._add(piece)
        return layout

    def _add(self, piece: RowPiece) -> None:
        prefix, offset = len(piece.packed.prefix_ids), len(self.ids)
        self.ids += piece.packed.prefix_ids[piece.start : piece.stop]
        self.positions += range(piece.start, piece.stop)
        if piece.packed.image_embeddings is not None and piece.has_prefix:
            self.images.append((piece, offset))
        for branch in piece.branches:
            self._add_steps(piece, branch, offset)
            self.ids += branch.ids
            self.positions += range(prefix, prefix + len(branch.ids))

    def _add_steps(self, piece: RowPiece, branch: Branch, offset: int) -> None:
        prefix, branch_offset = len(piece.packed.prefix_ids), len(self.ids)
        for tag, (start, end) in zip(branch.tags, branch.spans(prefix), strict=True):
            if start < prefix:
                self.split_steps.append(_SplitStep(len(self.tags), piece, offset, start))
            tokens = range(branch_offset + max(start - prefix, 0), branch_offset + end - prefix)
            self.step_tokens += tokens
            self.step_of_token += [len(self.tags)] * len(tokens)
            self.tags.append(branch_offset + tag)
            self.step_lengths.append(end - start)


def forward_row(text_model: Any, pieces: Sequence[RowPiece], device: torch.device) -> tuple[Tensor, Tensor]:
    """One forward pass over a row: ``states_TD`` and ``summaries_TD`` of the tags of all its branches, in order.

    Differentiable where nothing is cached. A pass that fails leaves the prefixes that it was to extend as they were, so
    that it can be tried again.
    """
    with _ONE_PASS, _unchanged_on_failure(pieces):
        return _forward_row(text_model, pieces, device)


@contextmanager
def _unchanged_on_failure(pieces: Sequence[RowPiece]) -> Iterator[None]:
    caches = [piece.cached for piece in pieces if piece.cached is not None]
    # Tensors are never written to, only replaced: the dictionaries and lists that name them are enough.
    contents = [(dict(cached.layers), list(cached.middle_PD)) for cached in caches]
    try:
        yield
    except BaseException:
        for cached, (layers, middle_PD) in zip(caches, contents, strict=True):
            cached.layers, cached.middle_PD = layers, middle_PD
        raise


def _forward_row(text_model: Any, pieces: Sequence[RowPiece], device: torch.device) -> tuple[Tensor, Tensor]:
    layout = RowLayout.of(pieces)
    embeddings_LD = _embed(text_model, layout, device)
    decoder = text_model.get_decoder()
    tags_T = _index(layout.tags, device)
    row = PackedRow([piece.block for piece in pieces], device)
    with _middle_states(decoder) as middle, _last_layer_at(decoder, row, layout.tags, tags_T):
        output = decoder(
            inputs_embeds=embeddings_LD[None],
            position_ids=_index(layout.positions, device)[None],
            # One element: `shared_prefix` says who attends to whom, and transformers would build a mask of L x L.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            shared_prefix=row,
            use_cache=False,
        )
    states_TD, middle_LD = output.last_hidden_state[0, tags_T], middle[0][0]
    # Before the summaries: those of a step that starts in the prefix need this row's part of it too.
    offset = 0
    for piece in pieces:
        if piece.cached is not None and piece.has_prefix:
            piece.cached.middle_PD.append(middle_LD[offset : offset + piece.stop - piece.start].clone())
        offset += piece.num_tokens
    return states_TD, _summaries(middle_LD, layout).to(states_TD.dtype)


def _embed(text_model: Any, layout: RowLayout, device: torch.device) -> Tensor:
    """Embeddings [L, D] of a row's tokens, those of images in the place of their tokens'."""
    ids_L = _index(layout.ids, device)
    embeddings_LD: Tensor = text_model.get_input_embeddings()(ids_L)
    for piece, offset in layout.images:
        assert piece.packed.image_embeddings is not None
        token = text_model.config.image_token_id
        ids_in_piece = ids_L[offset : offset + piece.stop - piece.start]
        places_I = offset + (ids_in_piece == token).nonzero()[:, 0]
        num_before = piece.packed.prefix_ids[: piece.start].count(token)  # in earlier rows of the same prefix
        rows_ID = piece.packed.image_embeddings.rows_ID[num_before : num_before + len(places_I)]
        embeddings_LD = embeddings_LD.index_copy(0, places_I, rows_ID.to(embeddings_LD))
    return embeddings_LD


def _summaries(middle_LD: Tensor, layout: RowLayout) -> Tensor:
    """The mean middle state [T, D, fp32] of each step's tokens; in two parts where a step starts in the prefix."""
    device = middle_LD.device
    sums_TD = torch.zeros(len(layout.tags), middle_LD.shape[1], dtype=torch.float32, device=device)
    in_branches_SD = middle_LD[_index(layout.step_tokens, device)].float()
    sums_TD = sums_TD.index_add(0, _index(layout.step_of_token, device), in_branches_SD)
    if layout.split_steps:
        in_prefix_SD = torch.stack([step.prefix_sum(middle_LD) for step in layout.split_steps])
        numbers = [step.tag for step in layout.split_steps]
        sums_TD = sums_TD.index_add(0, _index(numbers, device), in_prefix_SD)
    return sums_TD / _index(layout.step_lengths, device)[:, None]


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


@contextmanager
def _middle_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Catch what enters the middle layer, without keeping every layer's states."""
    layers: Any = decoder.layers
    states: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states[:] = [args[0]]

    handle = layers[len(layers) // 2].register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def _last_layer_at(decoder: nn.Module, row: PackedRow, tags: Sequence[int], tags_T: Tensor) -> Iterator[None]:
    """Compute of the last layer only what reaches the states at the tags: their queries and their MLP, all keys and
    values. Its other rows come out wrong, and nothing reads them.

    One layer's worth of work in `num_layers`, nearly whole.
    """
    # Not with a gradient: activation checkpointing would run the layer once more, without these hooks.
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

    mlp = layers[-1].mlp
    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
