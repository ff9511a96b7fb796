"""Shared-prefix attention: equal to a dense mask, forward and backward, whatever the lengths, kernels and heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medmm_ray.reward_model import attention
from medmm_ray.reward_model.attention import Block, PackedRow, PrefixKeyValues, _Batch, _Span

HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3
BLOCKS = [Block(5, (3, 3, 4)), Block(0, (2,)), Block(6, ()), Block(1, (1, 9, 2, 2, 7))]


def tensors(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, length, WIDTH, generator=generator, dtype=dtype) for heads in (HEADS, GROUPS, GROUPS)
    )
    return q, k, v


def mask(blocks: list[Block]) -> Tensor:
    """Who sees whom, written out: bool [L, L]."""
    length = sum(block.length for block in blocks)
    attends = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for block in blocks:
        begin = start + block.prefix
        attends[start:begin, start:begin] = True
        for branch in block.branches:
            attends[begin : begin + branch, start : start + block.prefix] = True
            attends[begin : begin + branch, begin : begin + branch] = True
            begin += branch
        start = begin
    return attends.tril()


def dense(q: Tensor, k: Tensor, v: Tensor, attends: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~attends, float("-inf"))
    return scores.softmax(dim=-1) @ v


def shared(q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
    return attention._SharedPrefix.apply(q, k, v, row, SCALE, 0)  # type: ignore[no-any-return,no-untyped-call]


@pytest.fixture(params=["fused", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's fused kernels, and the plain ones of devices without any (in blocks of few queries)."""
    if request.param == "plain":
        monkeypatch.setattr(attention, "PLAIN_BLOCK", 4)

        def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
            k, v = attention._as_many_heads(k, q), attention._as_many_heads(v, q)
            return attention._plain_attention(q, k, v, causal, scale)

        def backward(
            grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
        ) -> tuple[Tensor, Tensor, Tensor]:
            many_k, many_v = attention._as_many_heads(k, q), attention._as_many_heads(v, q)
            dq, dk, dv = attention._plain_backward(grad, q, many_k, many_v, out, lse, causal, scale)
            return dq, attention._as_few_heads(dk, k.shape[1]), attention._as_few_heads(dv, k.shape[1])

        monkeypatch.setattr(attention, "_attention", forward)
        monkeypatch.setattr(attention, "_attention_backward", backward)
    return str(request.param)


@pytest.mark.usefixtures("kernel")
def test_output_and_gradient_are_those_of_a_dense_mask() -> None:
    row, attends = PackedRow(BLOCKS), mask(BLOCKS)
    q, k, v = (t.requires_grad_() for t in tensors(row.length))
    ours, theirs = shared(q, k, v, row), dense(q, k, v, attends)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(1, 20), max_size=6)), min_size=1, max_size=4).filter(
        lambda blocks: all(prefix or branches for prefix, branches in blocks)
    )
)
def test_any_layout_equals_the_dense_mask(layout: list[tuple[int, list[int]]]) -> None:
    blocks = [Block(prefix, tuple(branches)) for prefix, branches in layout]
    row = PackedRow(blocks)
    q, k, v = tensors(row.length)
    assert torch.allclose(shared(q, k, v, row), dense(q, k, v, mask(blocks)), atol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_a_cached_prefix_serves_later_rows() -> None:
    whole = [Block(7, (3, 2, 5))]
    q, k, v = tensors(17)
    expected = dense(q, k, v, mask(whole))
    cached = PrefixKeyValues()
    first = shared(q[:, :, :10], k[:, :, :10], v[:, :, :10], PackedRow([Block(7, (3,), cached)]))
    later = shared(q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], PackedRow([Block(0, (2, 5), cached)]))
    assert torch.allclose(torch.cat([first, later], dim=2), expected, atol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_a_prefix_may_come_in_pieces_over_several_rows() -> None:
    whole = [Block(9, (3, 4))]
    q, k, v = tensors(16)
    expected = dense(q, k, v, mask(whole))
    cached, found, start = PrefixKeyValues(), [], 0
    for blocks in ([Block(4, (), cached)], [Block(3, (), cached)], [Block(2, (3,), cached)], [Block(0, (4,), cached)]):
        row = PackedRow(blocks)
        at = slice(start, start + row.length)
        found.append(shared(q[:, :, at], k[:, :, at], v[:, :, at], row))
        start = at.stop
    assert cached.layers[0][0].shape[2] == 9
    assert torch.allclose(torch.cat(found, dim=2), expected, atol=1e-12)


def test_a_cached_prefix_has_no_gradient_and_says_so() -> None:
    cached = PrefixKeyValues()
    q, k, v = tensors(6)
    shared(q, k, v, PackedRow([Block(4, (2,), cached)]))
    out = shared(q[:, :, :3].requires_grad_(), k[:, :, :3], v[:, :, :3], PackedRow([Block(0, (3,), cached)]))
    with pytest.raises(RuntimeError, match="train on whole questions"):
        torch.autograd.backward(out.sum())


def test_branches_of_like_length_go_together() -> None:
    row = PackedRow([Block(0, (4, 4, 3, 40, 4))])
    together, *alone = row.causal
    assert isinstance(together, _Batch)
    assert together.rows_BS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 8]]
    assert alone == [_Span(11, 51), _Span(51, 55)]


@pytest.mark.usefixtures("kernel")
def test_a_row_that_ends_at_some_tokens_gives_those_as_a_dense_mask_does() -> None:
    row, attends = PackedRow(BLOCKS), mask(BLOCKS)
    q, k, v = tensors(row.length)
    ends = [5, 10, 12, 16, 24, 43]  # of branches of the first, second and last block, one of them alone in its batch
    row.restrict_last_layer(ends)
    assert row.last_layer is not None
    ours, theirs = shared(q, k, v, row.last_layer), dense(q, k, v, attends)
    assert torch.allclose(ours[:, :, ends], theirs[:, :, ends], atol=1e-12)


def test_a_row_that_ends_at_some_tokens_still_keeps_its_prefix() -> None:
    cached = PrefixKeyValues()
    row = PackedRow([Block(4, (2, 3), cached)])
    q, k, v = tensors(9)
    row.restrict_last_layer([8])
    assert row.last_layer is not None
    shared(q, k, v, row.last_layer)
    keys, values = cached.layers[0]
    assert torch.equal(keys, k[:, :, :4])
    assert torch.equal(values, v[:, :, :4])
