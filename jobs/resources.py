"""What a run costs its machine: memory (proportional set size, so that shared pages count once) and CPU time."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil


class ResourceSampler:
    """Samples this process and all that descend from it, in a thread, while the ``with`` block runs.

    `peak_gib` is the largest sum of PSS in a sample; `core_minutes` the CPU time of every process, up to its last
    sample.
    """

    def __init__(self, interval_s: float = 5.0) -> None:
        self.interval_s = interval_s
        self.peak_gib = 0.0
        self._cpu_seconds: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="resources", daemon=True)

    @property
    def core_minutes(self) -> float:
        """CPU time so far, of processes that have ended too."""
        return sum(self._cpu_seconds.values()) / 60

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        memory_due = 0.0
        while not self._stop.wait(self.interval_s / 5):
            self.sample(memory=time.monotonic() >= memory_due)
            if time.monotonic() >= memory_due:  # reading PSS walks page tables: seldom
                memory_due = time.monotonic() + self.interval_s

    def sample(self, memory: bool = True) -> None:
        """Take one sample, of CPU time alone where `memory` is false."""
        this_process = psutil.Process()
        total = 0
        for process in (this_process, *this_process.children(recursive=True)):
            try:
                times = process.cpu_times()
                self._cpu_seconds[(process.pid, process.create_time())] = times.user + times.system
                total += process.memory_full_info().pss if memory else 0
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between the listing and the reading
        self.peak_gib = max(self.peak_gib, total / 2**30)
