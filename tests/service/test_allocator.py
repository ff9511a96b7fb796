"""Memory goes back to the system after requests, and not more often than it may."""

import asyncio

import psutil
import pytest

from medmm_ray.service import allocator


def rss_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_what_lies_free_between_what_is_used_goes_back() -> None:
    # Below glibc's threshold for pages of their own, and one in a hundred kept: the heap's end stays in use.
    blocks = [bytearray(60_000) for _ in range(4000)]
    kept = blocks[::100]
    del blocks
    before = rss_mib()
    allocator.trim()
    assert before - rss_mib() > 150, "229 MiB were freed, and 2 are kept"
    assert len(kept) == 40


def test_requests_that_come_together_are_trimmed_after_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[None] = []
    monkeypatch.setattr(allocator, "TRIM_S", 0.05)
    monkeypatch.setattr(allocator, "trim", lambda: trimmed.append(None))

    async def ask() -> None:
        trimmer = allocator.Trimmer()
        for _ in range(3):
            trimmer.note_request()
        await asyncio.sleep(0.5)
        assert len(trimmed) == 1
        trimmer.note_request()
        await asyncio.sleep(0.5)
        assert len(trimmed) == 2

    asyncio.run(ask())
