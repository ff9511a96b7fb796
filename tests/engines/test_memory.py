"""engines/memory.py: what is free, and what does not fit."""

import os
from pathlib import Path

import pytest

from medmm_ray.engines.memory import (
    GIB,
    EngineMemoryError,
    check_gpu_memory,
    check_memory,
    free_gpu_memory,
    free_memory,
    weight_bytes,
)


def test_memory_is_checked_before_an_engine_starts() -> None:
    check_memory(free=3 * GIB, weights=GIB // 2, kv_cache_gib=1)
    with pytest.raises(
        EngineMemoryError, match=r"needs 3.0 GiB \(weights 0.5, KV cache 1, engine 1.5\) and 2.0 GiB are"
    ):
        check_memory(free=2 * GIB, weights=GIB // 2, kv_cache_gib=1)


def test_gpu_memory_is_checked_before_an_engine_starts() -> None:
    check_gpu_memory([(76 * GIB, 80 * GIB)], 0.9)
    with pytest.raises(EngineMemoryError, match=r"takes 90% of the GPU's 80.0 GiB and 10.0 GiB are free"):
        check_gpu_memory([(76 * GIB, 80 * GIB), (10 * GIB, 80 * GIB)], 0.9)


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" >&2\necho "100, 200"\necho "300, 400"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert free_gpu_memory() == [(100 << 20, 200 << 20), (300 << 20, 400 << 20)]
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(EngineMemoryError, match="num_gpus is set and nvidia-smi finds no GPU here"):
        free_gpu_memory()


def test_free_memory_and_weights_are_counted_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.safetensors").write_bytes(b"123")
    (tmp_path / "config.json").write_text("{}")
    assert weight_bytes(str(tmp_path)) == 8
    assert GIB // 8 < free_memory() < 4096 * GIB
