"""What workers of a group have together: rows with their gradient, and rank 0's first weights.

Legend: B rows of this worker, N rows of all workers, E width.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def gathered_rows(rows_BE: "torch.Tensor") -> "tuple[torch.Tensor, int]":
    """The rows of all workers in the order of their ranks [N, E], and where this worker's begin; all call it together.

    Workers may have unlike numbers of rows. The gradient of each row is the sum of what all workers make of it. A
    process outside of a group is alone.
    """
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return rows_BE, 0
    group_size = torch.distributed.get_world_size()
    counts_W = torch.zeros(
        group_size,
        dtype=torch.long,
        device=rows_BE.device,
    )
    counts_W[torch.distributed.get_rank()] = len(rows_BE)
    torch.distributed.all_reduce(counts_W)
    counts: list[int] = counts_W.tolist()
    gathered: torch.Tensor = _gather_function().apply(rows_BE, counts)
    return gathered, sum(counts[: torch.distributed.get_rank()])


def is_first() -> bool:
    """Whether this process has rank 0, or is in no group."""
    import torch

    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def share_first(parameters: "Iterable[torch.nn.Parameter]") -> None:
    """Give all workers the values of rank 0; all call it together."""
    import torch

    if torch.distributed.is_initialized():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def _gather_function() -> Any:
    """The autograd function; made here, as importing this module loads no torch."""
    import torch

    class GatherRows(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            rows_BE: torch.Tensor,
            counts: list[int],
        ) -> torch.Tensor:
            # Workers' shares as rows of the same number, which a collective wants; what is padding is cut off again.
            padded = rows_BE.new_zeros(max(counts), *rows_BE.shape[1:])
            padded[: len(rows_BE)] = rows_BE
            shares = [torch.empty_like(padded) for _ in counts]
            torch.distributed.all_gather(shares, padded)
            start = sum(counts[: torch.distributed.get_rank()])
            ctx.own = slice(start, start + len(rows_BE))
            return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            gradient_NE = gradients[0].clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(gradient_NE)
            return gradient_NE[ctx.own], None

    return GatherRows
