"""The memory of a process, as Linux tells it, and work in a process of its own, whose peak is that work's alone."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_new_process(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What `work` gives in a fresh process: the most memory that an earlier one had says nothing of it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments, **named).result()


def highest_bytes() -> int:
    """The most memory that this process has had. Not getrusage's: that of a new process begins with its parent's."""
    return _status("VmHWM")


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a process, of this one without `pid`, that no file and no shared memory backs."""
    return _status("RssAnon", pid)


def _status(name: str, pid: int | None = None) -> int:
    path = Path(f"/proc/{pid or 'self'}/status")
    _, label, rest = path.read_text().partition(f"{name}:")
    if not label:
        raise OSError(f"{path} has no {name}: memory is measured on Linux alone")
    return 1024 * int(rest.split()[0])
