"""Shared by all tests: one Ray session and one object store for those that need one, no network, no clinical text in
logs."""

import os
from collections.abc import Iterator

import pytest

from tests.doubles import object_store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(object_store.environment())  # before Ray starts: its workers inherit it


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray session for the whole test run (starting one costs 5 s)."""
    from medmm_ray.session import session

    with session():
        yield


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket in an S3-compatible server on this machine."""
    with object_store.serving() as uri:
        yield uri
