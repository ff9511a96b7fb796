"""Number formats and devices as users of transformers name them: ``dtype="auto"``, ``device_map="cuda:0"``."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

Dtype: TypeAlias = "torch.dtype | Literal['auto']"
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def dtype_of(dtype: "str | torch.dtype | None", torch_dtype: "str | torch.dtype | None" = None) -> Dtype:
    """The number format that `dtype` names: one of `DTYPE_NAMES` or torch's own; "auto" is the checkpoint's.

    None is float32. `torch_dtype` is its older name. Raises ValueError for another format, and where the two differ.
    """
    import torch

    dtypes: list[Dtype] = []
    for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        if value is not None:
            dtypes.append(_parse_dtype(name, value))
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"dtype is {dtype!r} and torch_dtype {torch_dtype!r}; give one (torch_dtype is the older name)"
        )
    return dtypes[0] if dtypes else torch.float32


def _parse_dtype(name: str, value: "str | torch.dtype") -> Dtype:
    import torch

    if value == "auto":
        return "auto"
    for dtype_name in DTYPE_NAMES:
        dtype: torch.dtype = getattr(torch, dtype_name)
        if value in (dtype_name, dtype):
            return dtype
    expected = ", ".join(DTYPE_NAMES)
    raise ValueError(f"{name} is {value!r}; expected one of {expected}, torch's own of these, or 'auto'")


def device_of(device: "str | int | torch.device | None", device_map: Any = None) -> "torch.device":
    """The one device that `device` or `device_map` names: cpu, cuda, cuda:N, N, or "auto": the GPU, where there is one.

    None is the CPU. Raises ValueError for a device that is not there, and for a map over several devices: a model here
    lies on one.
    """
    import torch

    if device_map is not None and not isinstance(device_map, str | int | torch.device):
        raise ValueError(
            f"device_map is {device_map!r}; a model here lies on one device: name it (cpu, cuda, cuda:N) or give 'auto'"
        )
    devices: list[torch.device] = []
    for name, value in (("device", device), ("device_map", device_map)):
        if value is not None:
            devices.append(_parse_device(name, value))
    if len(set(devices)) > 1:
        raise ValueError(f"device is {device!r} and device_map {device_map!r}; give one")
    return devices[0] if devices else torch.device("cpu")


def _parse_device(name: str, value: "str | int | torch.device") -> "torch.device":
    import torch

    if value == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)  # before 16 GB are read in vain
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} is {str(value)!r}; expected cpu, cuda, cuda:N of this machine, or auto: {reason}"
        ) from None
    return device
