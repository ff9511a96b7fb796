"""Shared by all tests: one Ray session for those that need one, no network, no clinical text in logs."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray session for the whole test run (starting one costs 5 s)."""
    from medmm_ray.session import session

    with session():
        yield
