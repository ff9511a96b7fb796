"""engines/generator.py: what can be checked without an engine, and one real engine."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines import generator as module
from medmm_ray.engines.generator import (
    GIB,
    Completion,
    Generator,
    GeneratorConfig,
    GeneratorError,
    Prompt,
    Sampling,
    Statistics,
    check_gpu_memory,
    check_memory,
    check_model,
    engine_arguments,
    environment,
    free_memory,
    policy_prompt,
    request_seed,
    weight_bytes,
)
from medmm_ray.prompts import policy_messages
from medmm_ray.tables import RowError
from tests.fake_generator import FakeGenerator, make_tiny_policy, text_of

CONFIG = GeneratorConfig(max_model_len=256, dtype="float32")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model '/nowhere/policy' is not a folder"):
        Generator("/nowhere/policy", CONFIG)
    with pytest.raises(GeneratorError, match=r"holds no config.json"):
        check_model(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GeneratorError, match=r"model 'nobody/nothing' is neither a folder here nor a hub model"):
        check_model("nobody/nothing")


def test_memory_is_checked_before_an_engine_starts() -> None:
    check_memory(free=3 * GIB, weights=GIB // 2, kv_cache_gib=1)
    with pytest.raises(GeneratorError, match=r"needs 3.0 GiB \(weights 0.5, KV cache 1, engine 1.5\) and 2.0 GiB are"):
        check_memory(free=2 * GIB, weights=GIB // 2, kv_cache_gib=1)


def test_gpu_memory_is_checked_before_an_engine_starts() -> None:
    check_gpu_memory([(76 * GIB, 80 * GIB)], 0.9)
    with pytest.raises(GeneratorError, match=r"takes 90% of the GPU's 80.0 GiB and 10.0 GiB are free"):
        check_gpu_memory([(76 * GIB, 80 * GIB), (10 * GIB, 80 * GIB)], 0.9)


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" >&2\necho "100, 200"\necho "300, 400"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert module._free_gpu_memory() == [(100 << 20, 200 << 20), (300 << 20, 400 << 20)]
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(GeneratorError, match="num_gpus is set and nvidia-smi finds no GPU here"):
        module._free_gpu_memory()


def test_free_memory_and_weights_are_counted_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.safetensors").write_bytes(b"123")
    (tmp_path / "config.json").write_text("{}")
    assert weight_bytes(str(tmp_path)) == 8
    assert GIB // 8 < free_memory() < 4096 * GIB


def test_no_engine_starts_without_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(module, "free_memory", lambda: GIB)
    with pytest.raises(GeneratorError, match=r"1\.0 GiB are free"):
        Generator(str(tmp_path), CONFIG)


def test_arguments_of_a_cpu_and_a_gpu() -> None:
    cpu = engine_arguments("m", GeneratorConfig(max_model_len=8192))
    assert (cpu["enable_chunked_prefill"], cpu["max_num_batched_tokens"], cpu["block_size"]) == (False, 8192, 32)
    gpu = engine_arguments("m", GeneratorConfig(num_gpus=2, tensor_parallel_size=2))
    assert gpu["tensor_parallel_size"] == 2
    assert "block_size" not in gpu


def test_the_environment_of_vllm_on_a_cpu() -> None:
    variables = environment(GeneratorConfig(kv_cache_gib=3, num_threads=1))
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(GeneratorConfig(num_gpus=1))


def test_seeds_leave_room_for_samples() -> None:
    seed = request_seed("q1", "c")
    assert seed % 4096 == 0
    assert 0 < seed < 2**40
    assert seed == request_seed("q1", "c")
    assert seed != request_seed("q2", "c")


def test_documents_fill_the_prompt_and_a_long_one_is_skipped() -> None:
    fake = FakeGenerator(lambda prompt, seed: "")
    row = {
        "question": "Q",
        "options": ["a"],
        "answer_type": "choice",
        "documents": [{"text": "short"}, {"text": "x" * 500}, {"text": "brief"}, {"text": "unused"}],
    }
    assert (
        text_of(policy_prompt(fake, row, num_documents=3, room=100))
        == "Document 1: short\n\nDocument 2: brief\n\nQuestion: Q (A) a"
    )
    assert text_of(policy_prompt(fake, row, num_documents=0, room=100)) == "Question: Q (A) a"


def test_the_hit_rate() -> None:
    assert Statistics(prompt_tokens=200, cached_tokens=150).hit_rate == 0.75
    assert Statistics().hit_rate == 0.0


@pytest.mark.engine
def test_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded samples are the same whatever the batch; prefixes are continued and shared; faults are rows'."""
    for name, value in environment(CONFIG).items():  # the constructor sets them; the test takes them back
        monkeypatch.setenv(name, value)
    model = make_tiny_policy(tmp_path / "policy")
    engine = Generator(model, CONFIG)
    how = Sampling(temperature=1.0, top_k=0, max_tokens=24)
    prompts = [Prompt(policy_messages(f"What is in picture {i}?")) for i in range(3)]

    async def together(order: list[int]) -> dict[int, list[Completion]]:
        found = await asyncio.gather(*(engine.generate(prompts[i], 16, 4096 * i, how) for i in order))
        return dict(zip(order, found, strict=True))

    async def work() -> None:
        first = await together([0, 1, 2])
        assert [c.seed for c in first[1]] == list(range(4096, 4112))
        assert len({c.text for c in first[1]}) > 1
        assert {c.finish_reason for c in first[1]} <= {"stop", "length"}
        assert await together([2, 1, 0]) == first
        alone = [await engine.generate(prompts[1], 1, 4096 + i, how) for i in range(4)]
        assert [c for [c] in alone] == first[1][:4]

        assert engine.statistics.hit_rate > 0.5
        assert engine.statistics.output_tokens > 0

        prefix = "Step 1: The lung is clear.\nStep 2:"
        begun = replace(prompts[0], said=prefix)
        assert str(engine._tokenizer.decode(engine.token_ids(begun))).endswith(f"<|assistant|>{prefix}")
        constrained = Sampling(temperature=0.0, max_tokens=8, pattern="[01] (high|low)")
        [verdict] = await engine.generate(begun, 1, 0, constrained)
        assert verdict.text in ("0 high", "1 high", "0 low", "1 low")
        schema = {"type": "object", "properties": {"right": {"type": "boolean"}}, "required": ["right"]}
        [verdict] = await engine.generate(begun, 1, 0, Sampling(temperature=0.0, max_tokens=64, schema=schema))
        assert isinstance(json.loads(verdict.text)["right"], bool)
        [ended_by] = await engine.generate(prompts[0], 1, 7, Sampling(temperature=1.0, max_tokens=64, stop=("e",)))
        assert (ended_by.text[-1], ended_by.text.count("e"), ended_by.finish_reason) == ("e", 1, "stop")

        with pytest.raises(RowError, match=r"prompt_too_long: \d+ prompt tokens"):
            await engine.generate(replace(begun, said="lung " * 300), 1, 0, how)

        ended: list[int] = []
        monkeypatch.setattr(module, "end_process", lambda: ended.append(1))
        engine.shutdown()
        monkeypatch.setattr(engine, "_engine", DeadEngine())
        assert await engine.generate(prompts[0], 1, 0, how) == []
        assert ended == [1]

    asyncio.run(work())


class DeadEngine:
    """Stands for an engine whose processes were killed."""

    def generate(self, *arguments: Any) -> "DeadEngine":
        return self

    def __aiter__(self) -> "DeadEngine":
        return self

    async def __anext__(self) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        raise EngineDeadError()
