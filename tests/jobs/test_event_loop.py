"""event_loop.py: coroutines run to their end in a shell and in a notebook."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from jobs.event_loop import run_coroutine


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, as in a notebook: a shell's background jobs ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


async def thread_name() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_a_shell_needs_no_thread() -> None:
    assert run_coroutine(thread_name()) == threading.current_thread().name


def test_a_notebook_gets_the_result_of_a_loop_in_a_thread() -> None:
    async def cell() -> str:
        return run_coroutine(thread_name())

    assert asyncio.run(cell()).startswith("event-loop")


def test_what_is_raised_in_the_thread_is_raised_in_the_notebook() -> None:
    async def fail() -> None:
        raise ValueError("no key")

    async def cell() -> None:
        run_coroutine(fail())

    with pytest.raises(ValueError, match="no key"):
        asyncio.run(cell())


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_notebook_ends_what_it_waits_for() -> None:
    events: list[str] = []

    async def waits() -> None:
        await asyncio.sleep(0.2)  # until the notebook waits for it
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def cell() -> None:
        run_coroutine(waits())

    loop = asyncio.new_event_loop()  # as a notebook's it has no handler of Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    assert events == ["cancelled"]
