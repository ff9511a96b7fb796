"""Shared by all tests: one Ray session and one object store for those that need one, no network, no clinical text in
logs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import object_store

PLUGINS = str(Path(__file__).parent / "doubles" / "plugins")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Ray starts: its workers inherit it. The plugins are a package that is found as any installed one.
os.environ.update(object_store.environment())
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (PLUGINS, os.environ.get("PYTHONPATH"))))
sys.path.append(PLUGINS)


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
