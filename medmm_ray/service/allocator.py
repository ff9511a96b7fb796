"""What large requests leave with the allocator goes back to the system.

glibc keeps what is freed for its next use, by thread: after a few large bodies and pictures a replica, or a proxy,
would hold hundreds of MB that it never needs again.
"""

import asyncio
import ctypes
import platform
from functools import cache

TRIM_S = 5.0
"""Seconds from a request until its memory is given back; requests meanwhile share that."""


def trim() -> None:
    """Give free memory of this process back; nothing where the C library has no such call."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    # Python reads its own binary to know.
    return platform.libc_ver()[0] == "glibc"


class Trimmer:
    """Trims the process some seconds after a request, at most once in `TRIM_S`."""

    def __init__(self) -> None:
        self._trimming: asyncio.Task[None] | None = None

    def note_request(self) -> None:
        """A request is through; called on the event loop."""
        if self._trimming is None or self._trimming.done():
            self._trimming = asyncio.create_task(self._trim_later())

    async def _trim_later(self) -> None:
        await asyncio.sleep(TRIM_S)
        # The call lets other threads run.
        await asyncio.to_thread(trim)
