"""Seconds and peak memory of a call, on CPU and on a GPU."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from jobs.benches.process_memory import highest_bytes
from medmm_ray.service.allocator import trim

T = TypeVar("T")


def timed(do: Callable[[], T], repeats: int, device: str) -> tuple[float, T]:
    """The median seconds of `repeats` calls, and the last one's result."""
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        started = time.perf_counter()
        result = do()
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def peak_bytes(do: Callable[[], object], device: str) -> float:
    """Peak bytes of a call above those in use before; on a CPU by Linux's high-water mark of the process's memory."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        do()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    trim()  # else memory that earlier calls left with the allocator would be reused, unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
    before = highest_bytes()
    do()
    return float(max(highest_bytes() - before, 1))


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
