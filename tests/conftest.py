"""Shared by all tests: one Ray session and one object store for those that need one, no network, no clinical text in
logs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import object_store
from tests.paths import ROOT

PLUGINS = str(Path(__file__).parent / "doubles" / "plugins")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Ray starts: its workers inherit it. The plugins are a package that is found as any installed one.
os.environ.update(object_store.environment())
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (PLUGINS, os.environ.get("PYTHONPATH"))))
sys.path.append(PLUGINS)


# Seconds each on two quiet cores, the longest first: a process that comes to one of them last keeps the other waiting.
LONGEST_FIRST = (
    "tests/jobs/test_pipeline.py",
    "tests/train/test_ray.py",
    "tests/jobs/test_resume.py",
    "tests/jobs/test_bench.py",
    "tests/steps/test_score.py",
    "tests/service/test_app.py",
    "tests/engines/test_generator.py",
    "tests/reward_model/test_vllm.py",
    "tests/cluster/test_submit.py",
    "tests/steps/test_judge.py",
    "tests/cluster/test_labels.py",
    "tests/jobs/test_sharing.py",
    "tests/steps/test_embed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    ranks = {ROOT / file: rank for rank, file in enumerate(LONGEST_FIRST)}
    if absent := [str(path) for path in ranks if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names {', '.join(absent)} as slow, and there is no such file")
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


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
