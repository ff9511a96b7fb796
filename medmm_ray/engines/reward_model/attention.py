"""Shared-prefix attention over a packed row: only pairs of tokens that see each other cost anything.

A row holds questions one after another: each a prefix, causal on itself, and branches that see the prefix and,
causally, themselves. The prefix is attended to by all branches of its question in one pass without a mask; that and
each branch's own pass are merged by their log-sum-exps, which is exact. The backward pass of each part is that of flash
attention given the *merged* output and log-sum-exp (as in ring attention, arXiv 2310.01889), so the gradient is exact.

It enters a transformers model as the attention implementation `NAME`; calls without a `Row` are plain SDPA.

Legend: B batch (1 for a row), H heads, G heads of keys and values, L row length, E head width.
"""

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
class Held:
    """A prefix's keys and values by layer [1, G, P, E], kept for branches in later rows (scoring only)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """One question's part of a row: `prefix` tokens, then branches of these lengths.

    `held` keeps the prefix's keys and values where the row has the prefix, and stands for it where it has not.
    """

    prefix: int
    branches: tuple[int, ...]
    held: Held | None = None

    @property
    def length(self) -> int:
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class _Part:
    """Queries of the row and the keys that they see: rows [start, stop), or `rows_BS` (short branches, padded)."""

    start: int
    stop: int
    keys: tuple[int, int] | Held | None = None  # None: their own, causally
    rows_BS: Tensor | None = None
    real_BS: Tensor | None = None


class Row:
    """What attends to what in a packed row of `blocks`."""

    def __init__(self, blocks: Sequence[Block], device: torch.device | str = "cpu") -> None:
        self.length = sum(block.length for block in blocks)
        self.kept = []  # (held, start, stop) of prefixes whose keys and values are wanted later
        self.own: list[_Part] = []
        self.shared: list[_Part] = []
        start = 0
        for block in blocks:
            begin = start + block.prefix
            stop = start + block.length
            if block.prefix:
                self.own.append(_Part(start, begin))
                if block.held is not None:
                    self.kept.append((block.held, start, begin))
            if block.branches:
                self.own += _branch_parts(begin, block.branches, device)
                if block.prefix:
                    self.shared.append(_Part(begin, stop, (start, begin)))
                elif block.held is not None:
                    self.shared.append(_Part(begin, stop, block.held))
            start = stop

    @property
    def parts(self) -> list[_Part]:
        return [*self.own, *self.shared]


def _branch_parts(start: int, lengths: Sequence[int], device: torch.device | str) -> list[_Part]:
    """The branches' own parts: neighbours of like length go together, a long one alone."""
    parts: list[_Part] = []
    spans: list[tuple[int, int]] = []

    def close() -> None:
        if len(spans) == 1:
            parts.append(_Part(*spans[0]))
        elif spans:
            longest = max(stop - begin for begin, stop in spans)
            at_S = torch.arange(longest)
            begin_B1 = torch.tensor([[begin] for begin, _ in spans])
            real_BS = at_S < torch.tensor([[stop - begin] for begin, stop in spans])
            rows_BS = torch.where(real_BS, begin_B1 + at_S, begin_B1)
            parts.append(_Part(spans[0][0], spans[-1][1], None, rows_BS.to(device), real_BS.to(device)))
        spans.clear()

    for length in lengths:
        if spans:
            longest = max(length, *(stop - begin for begin, stop in spans))
            padded = longest * (len(spans) + 1)
            real = start + length - spans[0][0]
            if padded > MAX_BATCH or padded - real > MAX_PADDING * padded:
                close()
        spans.append((start, start + length))
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
    shared_prefix: Row | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, L, E] queries to [1, L, H, E]."""
    if shared_prefix is None:
        out_BLHE, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return out_BLHE, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_1HLE: Tensor = _SharedPrefix.apply(  # type: ignore[no-untyped-call]
        query, key, value, shared_prefix, scale, module.layer_idx
    )
    return out_1HLE.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _SharedPrefix(torch.autograd.Function):
    """query [1, H, L, E], key and value [1, G, L, E] -> [1, H, L, E]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, layer: int) -> Tensor:
        for held, start, stop in row.kept:
            held.layers[layer] = (key[:, :, start:stop].clone(), value[:, :, start:stop].clone())
        # [L, H, E] in memory, which is how the model wants it back.
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in row.own:
            part_out, part_lse = _attention(
                _rows(query, part), _rows(key, part), _rows(value, part), causal=True, scale=scale
            )
            if part.rows_BS is None:
                out[:, :, part.start : part.stop] = part_out
                lse[:, :, part.start : part.stop] = part_lse
            else:
                rows = part.rows_BS[part.real_BS]
                out[0].index_copy_(1, rows, part_out.transpose(0, 1)[:, part.real_BS])
                lse[0].index_copy_(1, rows, part_lse.transpose(0, 1)[:, part.real_BS].to(lse.dtype))
        for part in row.shared:
            keys, values = _seen(part, key, value, layer)
            at = slice(part.start, part.stop)
            far_out, far_lse = _attention(query[:, :, at], keys, values, causal=False, scale=scale)
            near_lse = lse[:, :, at]
            both_lse = torch.logaddexp(near_lse, far_lse)
            near = torch.exp(near_lse - both_lse)[..., None]
            far = torch.exp(far_lse - both_lse)[..., None]
            out[:, :, at] = (out[:, :, at] * near + far_out * far).to(out.dtype)
            lse[:, :, at] = both_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad_out,) = gradients
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        for part in ctx.row.parts:
            if isinstance(part.keys, Held):
                raise RuntimeError(
                    "a prefix that is held from an earlier row has no gradient; train on whole questions"
                )
            own = part.keys is None
            keys_of = part if own else _Part(*part.keys)
            part_lse = _rows(lse[..., None], part)[..., 0]
            part_grad = _rows(grad_out, part)
            if part.real_BS is not None:  # what stands for padding must add nothing
                part_lse = part_lse.masked_fill(~part.real_BS[:, None], float("inf"))
                part_grad = part_grad.masked_fill(~part.real_BS[:, None, :, None], 0.0)
            part_grads = _attention_backward(
                part_grad, _rows(query, part), _rows(key, keys_of), _rows(value, keys_of), _rows(out, part), part_lse,
                causal=own, scale=ctx.scale,
            )  # fmt: skip
            for grad, part_grad_, where in zip(grads, part_grads, (part, keys_of, keys_of), strict=True):
                if where.rows_BS is None:
                    grad[:, :, where.start : where.stop] += part_grad_
                else:
                    grad[0].index_add_(1, where.rows_BS[where.real_BS], part_grad_.transpose(0, 1)[:, where.real_BS])
        return grads[0], grads[1], grads[2], None, None, None


def _rows(tensor: Tensor, part: _Part) -> Tensor:
    """The part's rows of [1, H, L, E]: [1, H, S, E], or [B, H, S, E] for a batch of branches."""
    if part.rows_BS is None:
        return tensor[:, :, part.start : part.stop]
    return tensor[0][:, part.rows_BS].transpose(0, 1)


def _seen(part: _Part, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    if isinstance(part.keys, Held):
        return part.keys.layers[layer]
    assert part.keys is not None
    seen = _Part(*part.keys)
    return _rows(key, seen), _rows(value, seen)


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
