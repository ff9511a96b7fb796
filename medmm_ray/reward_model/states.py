"""Tag states as bytes of a `records.States` row, and back."""

import torch
from torch import Tensor

# Of each format the type of its values, and one of the same size that numpy has too: it has no bfloat16.
_RAW = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.int16),
}


def to_bytes(states_TD: Tensor) -> bytes:
    """Little-endian values, row by row; bfloat16 as its raw 16 bits."""
    _, raw = _RAW[dtype_name(states_TD)]
    return states_TD.detach().cpu().contiguous().view(raw).numpy().tobytes()


def from_bytes(content: bytes, num_steps: int, hidden_size: int, dtype: str) -> Tensor:
    """``states_TD`` of what `to_bytes` wrote; a `ValueError` where the sizes do not fit."""
    kind, raw = _RAW[dtype]
    values = torch.frombuffer(bytearray(content), dtype=raw).view(kind) if content else torch.zeros(0, dtype=kind)
    if values.numel() != num_steps * hidden_size:
        raise ValueError(f"{values.numel()} stored values for {num_steps} steps of width {hidden_size} in {dtype}")
    return values.view(num_steps, hidden_size)


def dtype_name(states: Tensor) -> str:
    """The name of its number format, as records have it: float32, float16 or bfloat16."""
    return str(states.dtype).removeprefix("torch.")
