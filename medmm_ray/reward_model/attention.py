"""Shared-prefix attention over a packed row: only pairs of tokens that see each other cost anything.

A row holds questions one after another: each a prefix, causal on itself, and branches that see the prefix and,
causally, themselves. The prefix is attended to by all branches of its question in one pass without a mask; that and
each branch's own pass are merged by their log-sum-exps, which is exact. The backward pass of each part is that of flash
attention given the *merged* output and log-sum-exp (as in ring attention, arXiv 2310.01889), so the gradient is exact.

It enters a transformers model as the attention implementation `NAME`; calls without a `PackedRow` are plain SDPA.

Legend: B batch (1 for a row), H heads, G heads of keys and values, L row length, E head width.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
MAX_PADDING = 0.25  # of a batch of branches of unequal length
MAX_BATCH = 4096  # tokens of such a batch
PLAIN_BLOCK = 1024  # queries that meet all keys at once where no fused kernel serves


@dataclass
class PrefixKeyValues:
    """A prefix's keys and values by layer [1, G, P, E], kept for later rows of its question (scoring only)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        if layer in self.layers:
            before = self.layers[layer]
            self.layers[layer] = (torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2))
        else:
            self.layers[layer] = (key.clone(), value.clone())


@dataclass(frozen=True)
class Block:
    """One question's part of a row: `prefix` tokens, then branches of these lengths.

    What earlier rows `held` of the prefix stands before it; what this row has of it is added there.
    """

    prefix: int
    branches: tuple[int, ...]
    cached: PrefixKeyValues | None = None

    @property
    def length(self) -> int:
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class _Span:
    """Rows [start, stop) of [1, H, L, E] (or [1, H, L])."""

    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, self.start : self.stop]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        self.of(tensor).copy_(values)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        self.of(tensor).add_(values)


@dataclass(frozen=True)
class _Batch:
    """Short spans of like length side by side: rows of [1, H, L, E] as [B, H, S, E]; what is not `real_BS` is padding
    (the span's first row again)."""

    rows_BS: Tensor
    real_BS: Tensor

    @classmethod
    def of_spans(cls, spans: Sequence[_Span], device: torch.device | str) -> "_Batch":
        at_S = torch.arange(max(span.stop - span.start for span in spans))
        start_B1 = torch.tensor([[span.start] for span in spans])
        real_BS = at_S < torch.tensor([[span.stop - span.start] for span in spans])
        return cls(torch.where(real_BS, start_B1 + at_S, start_B1).to(device), real_BS.to(device))

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[0][:, self.rows_BS].transpose(0, 1)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        tensor[0].index_copy_(1, self.rows_BS[self.real_BS], self._real(values).to(tensor.dtype))

    def add(self, tensor: Tensor, values: Tensor) -> None:
        tensor[0].index_add_(1, self.rows_BS[self.real_BS], self._real(values))

    def silent(self, grad_BHSE: Tensor, lse_BHS: Tensor) -> tuple[Tensor, Tensor]:
        """A gradient and log-sum-exps with which padding adds nothing to any gradient."""
        padding_B1S = ~self.real_BS[:, None]
        return grad_BHSE.masked_fill(padding_B1S[..., None], 0.0), lse_BHS.masked_fill(padding_B1S, float("inf"))

    def _real(self, values: Tensor) -> Tensor:
        return values.transpose(0, 1)[:, self.real_BS]


@dataclass(frozen=True)
class _Rows:
    """Rows of [1, H, L, E] (or [1, H, L]) by number."""

    rows_T: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, self.rows_T]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        tensor.index_copy_(2, self.rows_T, values.to(tensor.dtype))

    def add(self, tensor: Tensor, values: Tensor) -> None:
        tensor.index_add_(2, self.rows_T, values)


_Part = _Span | _Batch | _Rows


class PackedRow:
    """What attends to what in a packed row of `blocks`."""

    def __init__(self, blocks: Sequence[Block], device: torch.device | str = "cpu") -> None:
        self.length = sum(block.length for block in blocks)
        self.device = device
        self.caches: list[tuple[PrefixKeyValues, _Span]] = []
        """Prefixes whose keys and values are wanted later."""
        self.causal: list[_Span | _Batch] = []
        """What attends to itself, causally."""
        self.shared: list[tuple[_Span | _Rows, _Span | PrefixKeyValues]] = []
        """Tokens, and what all of them see before themselves."""
        self.last_layer: PackedRow | None = None
        """What is left of this in the last layer, where that is less."""
        start = 0
        for block in blocks:
            prefix, branches = _Span(start, start + block.prefix), _Span(start + block.prefix, start + block.length)
            start = branches.stop
            if block.cached is not None and block.cached.layers:
                self.shared.append((_Span(prefix.start, branches.stop), block.cached))
            if block.prefix:
                self.causal.append(prefix)
                if block.cached is not None:
                    self.caches.append((block.cached, prefix))
            if block.branches:
                self.causal += _branch_parts(branches.start, block.branches, device)
                if block.prefix:
                    self.shared.append((branches, prefix))

    def restrict_last_layer(self, rows: Sequence[int]) -> None:
        """Say that of the last layer's outputs only those of `rows` (ascending, all in branches) are wanted.

        There the prefix is not a query any more, and of the branches only `rows` look at it; all keys and values stay.
        """
        last = PackedRow([], self.device)
        last.length, last.caches = self.length, self.caches
        last.causal = [part for part in self.causal if isinstance(part, _Batch) or _between(rows, part)]
        for span, before in self.shared:
            assert isinstance(span, _Span)
            wanted = _between(rows, span)
            if wanted:
                last.shared.append((_Rows(torch.tensor(wanted, device=self.device)), before))
        self.last_layer = last


def _between(rows: Sequence[int], span: _Span) -> Sequence[int]:
    """Those of the ascending `rows` that lie in `span`."""
    return rows[bisect_left(rows, span.start) : bisect_left(rows, span.stop)]


def _branch_parts(start: int, lengths: Sequence[int], device: torch.device | str) -> list[_Span | _Batch]:
    """The branches' own parts: neighbours of like length go together, a long one alone."""
    parts: list[_Span | _Batch] = []
    spans: list[_Span] = []

    def close() -> None:
        if spans:
            parts.append(spans[0] if len(spans) == 1 else _Batch.of_spans(spans, device))
        spans.clear()

    for length in lengths:
        if spans:
            longest = max(length, *(span.stop - span.start for span in spans))
            padded = longest * (len(spans) + 1)
            real = start + length - spans[0].start
            if padded > MAX_BATCH or padded - real > MAX_PADDING * padded:
                close()
        spans.append(_Span(start, start + length))
        start += length
    close()
    return parts


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prefix: PackedRow | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, L, E] queries to [1, L, H, E]."""
    if shared_prefix is None:
        out_BLHE, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return out_BLHE, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shared_prefix.last_layer is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        shared_prefix = shared_prefix.last_layer
    out_1HLE: Tensor = _SharedPrefix.apply(  # type: ignore[no-untyped-call]
        query, key, value, shared_prefix, scale, module.layer_idx
    )
    return out_1HLE.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _SharedPrefix(torch.autograd.Function):
    """query [1, H, L, E], key and value [1, G, L, E] -> [1, H, L, E]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, layer: int
    ) -> Tensor:
        # [L, H, E] in memory, which is how the model wants it back; zeros, as a last layer does not fill every row.
        out = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in row.causal:
            part_out, part_lse = _attention(part.of(query), part.of(key), part.of(value), causal=True, scale=scale)
            part.put(out, part_out)
            part.put(lse, part_lse)
        for span, seen in row.shared:
            keys, values = seen.layers[layer] if isinstance(seen, PrefixKeyValues) else (seen.of(key), seen.of(value))
            far_out, far_lse = _attention(span.of(query), keys, values, causal=False, scale=scale)
            near_lse = span.of(lse)
            both_lse = torch.logaddexp(near_lse, far_lse)
            near = torch.exp(near_lse - both_lse)[..., None]
            far = torch.exp(far_lse - both_lse)[..., None]
            span.put(out, span.of(out) * near + far_out * far)
            span.put(lse, both_lse)
        for held, span in row.caches:
            held.append(layer, span.of(key), span.of(value))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad_out,) = gradients
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]

        def add(queries: _Part, keys: _Part, causal: bool) -> None:
            grad, part_lse = queries.of(grad_out), queries.of(lse)
            if isinstance(queries, _Batch):
                grad, part_lse = queries.silent(grad, part_lse)
            found = _attention_backward(
                grad, queries.of(query), keys.of(key), keys.of(value), queries.of(out), part_lse, causal, ctx.scale
            )
            for whole, part, where in zip(grads, found, (queries, keys, keys), strict=True):
                where.add(whole, part)

        for part in ctx.row.causal:
            add(part, part, causal=True)
        for span, seen in ctx.row.shared:
            if isinstance(seen, PrefixKeyValues):
                raise RuntimeError(
                    "a prefix that is held from an earlier row has no gradient; train on whole questions"
                )
            add(span, seen, causal=False)
        return grads[0], grads[1], grads[2], None, None, None


# One part: softmax(q k' scale) v [B, H, S, E] and its log-sum-exp [B, H, S] in float32 (or wider)


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    k, v = _as_many_heads(k, q), _as_many_heads(v, q)
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    return _plain_attention(q, k, v, causal, scale)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[1]
    k, v = _as_many_heads(k, q), _as_many_heads(v, q)
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the random state of a dropout that is not there
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
            scale=scale,
        )  # fmt: skip
    else:
        dq, dk, dv = _plain_backward(grad, q, k, v, out, lse, causal, scale)
    return dq, _as_few_heads(dk, heads), _as_few_heads(dv, heads)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The same on any device and in any type, a block of queries at a time to bound the scores in memory."""
    outs, lses = [], []
    for start in range(0, q.shape[2], PLAIN_BLOCK):
        scores = _scores(q[:, :, start : start + PLAIN_BLOCK], k, start if causal else None, scale)
        lse = scores.logsumexp(dim=-1)
        outs.append(torch.exp(scores - lse[..., None]) @ v.to(scores.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse.dtype
    dqs, dk, dv = [], k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    for start in range(0, q.shape[2], PLAIN_BLOCK):
        at = slice(start, start + PLAIN_BLOCK)
        weights = torch.exp(_scores(q[:, :, at], k, start if causal else None, scale) - lse[:, :, at, None])
        grad_at = grad[:, :, at].to(wide)
        inner = (grad_at * out[:, :, at].to(wide)).sum(dim=-1, keepdim=True)
        dscores = weights * (grad_at @ v.to(wide).transpose(-1, -2) - inner) * scale
        dqs.append(dscores @ k.to(wide))
        dk += dscores.transpose(-1, -2) @ q[:, :, at].to(wide)
        dv += weights.transpose(-1, -2) @ grad_at
    return torch.cat(dqs, dim=2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, first: int | None, scale: float) -> Tensor:
    """Scaled products; with `first`, the number of the first query, those with later keys are -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if first is not None:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(unseen, float("-inf"))
    return scores


def _as_many_heads(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, G, S, E] with one copy for each of the queries' heads [B, H, S, E]."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _as_few_heads(grad: Tensor, heads: int) -> Tensor:
    """The sum over each group's heads: [B, H, S, E] to [B, G, S, E]."""
    if grad.shape[1] == heads:
        return grad
    size, many, *rest = grad.shape
    return grad.reshape(size, heads, many // heads, *rest).sum(dim=2)
