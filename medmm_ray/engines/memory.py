"""Whether an engine fits: free memory of the machine and of its GPUs, before anything is loaded."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from medmm_ray.config import ConfigError

GIB = 1 << 30
ENGINE_GIB = 1.5  # what vLLM's processes take besides weights and cache; measured 1.2-1.4 on a CPU


class EngineMemoryError(ConfigError):
    """An engine that does not fit; the message says what it takes and what is free."""


def weight_bytes(model: str) -> int:
    """Bytes of the weight files of a checkpoint folder; 0 for a hub name, whose size is not known here."""
    files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    # In a container the machine's free memory is not ours to take.
    limit_file, used_file = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    if limit != "max":
        free = min(free, int(limit) - int(used_file.read_text()))
    return free


def check_memory(free: int, weights: int, kv_cache_gib: float) -> None:
    """Raise `EngineMemoryError` where an engine would not fit into `free` bytes; `weights` are the files' bytes."""
    needed = weights + (kv_cache_gib + ENGINE_GIB) * GIB
    if free < needed:
        raise EngineMemoryError(
            f"vLLM needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, KV cache {kv_cache_gib:g}, engine "
            f"{ENGINE_GIB:g}) and {free / GIB:.1f} GiB are free; end other programs or lower kv_cache_gib"
        )


def check_gpu_memory(gpus: Sequence[tuple[int, int]], utilization: float) -> None:
    """Raise `EngineMemoryError` where a GPU, given as (free, total) bytes, has less free than the engine will take."""
    for free, total in gpus:
        if free < utilization * total:
            raise EngineMemoryError(
                f"vLLM takes {utilization:.0%} of the GPU's {total / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; "
                "end what else runs on it or lower gpu_memory_utilization"
            )


def free_gpu_memory() -> list[tuple[int, int]]:
    """(free, total) bytes of each GPU of this actor, asked of the driver: a CUDA context here would cost memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    if visible:
        command += ["--id", visible]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineMemoryError(
            f"num_gpus is set and nvidia-smi finds no GPU here ({error}); set num_gpus=0"
        ) from error
    gpus: list[tuple[int, int]] = []
    for line in completed.stdout.splitlines():
        free_mib, total_mib = line.split(",")
        gpus.append((int(free_mib) << 20, int(total_mib) << 20))
    return gpus
