"""Seconds and peak memory of a call, on CPU and on a GPU."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")


def timed(do: Callable[[], T], repeats: int, device: str) -> tuple[float, T]:
    """The median of the seconds of `repeats` calls, and what the last one gave."""
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        started = time.perf_counter()
        result = do()
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def peak_bytes(do: Callable[[], object], device: str) -> float:
    """Bytes above what is held before; on CPU the process's memory, looked at every 5 ms."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        do()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier calls left with the allocator would be used again, unseen
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        do()
    finally:
        done.set()
        watcher.join()
    return float(max(most - before, 1))


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
