"""engines/generator.py: what can be checked without an engine, and one real engine."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medmm_ray.config import ConfigError, load
from medmm_ray.data.tables import RowError
from medmm_ray.engines import vllm_engine as module
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import (
    CacheHits,
    Completion,
    Generator,
    Sampling,
    Statistics,
    policy_prompt,
    request_seed,
)
from medmm_ray.engines.memory import GIB, EngineMemoryError
from medmm_ray.engines.vllm_engine import (
    GeneratorError,
    VllmEngine,
    check_model,
    engine_arguments,
    environment,
    lora_rank,
)
from medmm_ray.prompts import policy_messages
from tests.doubles.fake_generator import FakeGenerator, make_tiny_policy, make_tiny_seeing_policy, text_of
from tests.doubles.tiny_vision import picture
from tests.engines.test_weights import POINTER, change_weights, cut

EMBED = "base_model.model.model.embed_tokens.weight"
CONFIG = VllmEngine(max_model_len=256, dtype="float32")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model '/nowhere/policy' is not a folder"):
        Generator("/nowhere/policy", CONFIG)
    with pytest.raises(GeneratorError, match=r"holds no config.json"):
        check_model(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GeneratorError, match=r"model 'nobody/nothing' is neither a folder nor a hub model"):
        check_model("nobody/nothing")


def test_no_engine_starts_without_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(module, "free_memory", lambda: GIB)
    with pytest.raises(EngineMemoryError, match=r"1\.0 GiB are free"):
        Generator(str(tmp_path), CONFIG)


def test_arguments_of_a_cpu_and_a_gpu() -> None:
    cpu = engine_arguments("m", VllmEngine(max_model_len=8192))
    assert (cpu["enable_chunked_prefill"], cpu["max_num_batched_tokens"], cpu["block_size"]) == (False, 8192, 32)
    gpu = engine_arguments("m", VllmEngine(num_gpus=2, tensor_parallel_size=2))
    assert gpu["tensor_parallel_size"] == 2
    assert "block_size" not in gpu


def test_a_model_on_several_gpus_runs_in_processes_of_its_own() -> None:
    assert gpu_arguments(num_gpus=4, tensor_parallel_size=4)["distributed_executor_backend"] == "mp"
    assert gpu_arguments(num_gpus=1)["distributed_executor_backend"] is None
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4 needs num_gpus=4, got 1"):
        load(VllmEngine, None, ["num_gpus=1.0", "tensor_parallel_size=4"])


def gpu_arguments(**settings: Any) -> dict[str, Any]:
    return engine_arguments("m", VllmEngine(**settings))


def test_images_and_further_arguments_reach_the_engine() -> None:
    assert "limit_mm_per_prompt" not in gpu_arguments()
    assert gpu_arguments(num_images=2)["limit_mm_per_prompt"] == {"image": 2}
    assert gpu_arguments(vllm={"quantization": "fp8", "dtype": "auto"})["quantization"] == "fp8"
    assert gpu_arguments(vllm={"dtype": "auto"})["dtype"] == "auto"


def test_kernels_that_do_not_depend_on_the_batch() -> None:
    assert environment(VllmEngine(num_gpus=1, batch_invariant=True))["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in environment(VllmEngine(num_gpus=1))
    assert "VLLM_BATCH_INVARIANT" not in environment(VllmEngine(batch_invariant=True))  # a CPU has them


def test_room_for_an_adapter_is_that_of_its_largest_rank(tmp_path: Path) -> None:
    def rank(**told: Any) -> int:
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
        return lora_rank(str(tmp_path))

    assert (rank(r=4), rank(r=8), rank(r=9, rank_pattern={}), rank(r=16, rank_pattern={"q": 40})) == (8, 8, 16, 64)
    assert engine_arguments("m", CONFIG, str(tmp_path))["max_lora_rank"] == 64
    with pytest.raises(GeneratorError, match="has rank 600; vLLM takes up to 512"):
        rank(r=600)
    with pytest.raises(GeneratorError, match="/nowhere is not the folder of a peft adapter"):
        lora_rank("/nowhere")


def test_what_a_request_found_in_the_cache_is_known_when_all_its_samples_ended() -> None:
    async def work() -> list[int]:
        hits = CacheHits()
        with hits.of_request("a", 2) as found:
            hits.note_finished("a", 0)
            hits.note_finished("other", 5)
            assert not found.done()
            hits.note_finished("a", 32)
            return await found

    assert asyncio.run(work()) == [0, 32]


def test_the_environment_of_vllm_on_a_cpu() -> None:
    variables = environment(VllmEngine(kv_cache_gib=3, num_threads=1))
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(VllmEngine(num_gpus=1))


def test_seeds_leave_room_for_samples() -> None:
    seed = request_seed("q1", "c")
    assert seed % 4096 == 0
    # The first 40 bits of the SHA-256 of '["q1","c"]', 0x494ece2138, without the lowest 12.
    assert seed == 0x494ECE2000
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
        text_of(policy_prompt(fake, row, num_documents=3, max_tokens=100))
        == "Document 1: short\n\nDocument 2: brief\n\nQuestion: Q (A) a"
    )
    assert text_of(policy_prompt(fake, row, num_documents=0, max_tokens=100)) == "Question: Q (A) a"
    assert [policy_prompt(fake, row, num, 100).num_documents for num in (0, 1, 3)] == [0, 1, 2]


def test_documents_that_all_fit_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGenerator(lambda prompt, seed: "")
    counted: list[str] = []

    def count(prompt: ChatPrompt) -> int:
        counted.append(text_of(prompt))
        return 50

    monkeypatch.setattr(fake, "count", count)
    row = {"question": "Q", "options": [], "answer_type": "open", "documents": [{"text": "a"}, {"text": "b"}]}
    assert (
        text_of(policy_prompt(fake, row, num_documents=2, max_tokens=100))
        == "Document 1: a\n\nDocument 2: b\n\nQuestion: Q"
    )
    assert len(counted) == 1


def test_the_hit_rate() -> None:
    assert Statistics(prompt_tokens=200, cached_tokens=150).hit_rate == 0.75
    assert Statistics().hit_rate == 0.0
    statistics = Statistics()
    statistics.add([Completion("a", "stop", 0, 3, 100, 96, 0), Completion("b", "stop", 1, 4, 100, 96, 96)])
    assert statistics == Statistics(prompt_tokens=200, cached_tokens=96, output_tokens=7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w, None),
        (
            lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()},
            "'_orig_mod.'",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.q_proj.lora_B" not in k}, "missing are 1: "),
        (
            lambda w: w | {EMBED: torch.ones(513, 128)},
            "whole weights of another shape than its base.s .*embed_tokens.weight",
        ),
    ],
)
def test_an_adapter_that_vllm_would_not_use_whole_is_refused(change: Any, words: str | None, tmp_path: Path) -> None:
    model = make_tiny_policy(tmp_path / "policy")
    make_adapter(model, tmp_path / "adapter")
    change_weights(tmp_path / "adapter", change, "adapter_model.safetensors")
    if words is None:
        module.check_weights(model, {}, str(tmp_path / "adapter"))
        return
    with pytest.raises(GeneratorError, match=words):
        module.check_weights(model, {}, str(tmp_path / "adapter"))


def test_an_adapter_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = make_tiny_policy(tmp_path / "policy")
    make_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    cut(file)
    with pytest.raises(GeneratorError, match=r"adapter_model.safetensors is not whole"):
        module.check_weights(model, {}, str(tmp_path / "adapter"))
    file.write_text(POINTER)
    with pytest.raises(GeneratorError, match=r"adapter_model.safetensors is a git-lfs pointer"):
        module.check_weights(model, {}, str(tmp_path / "adapter"))


def test_a_policy_that_sees_is_checked_as_what_it_is(tmp_path: Path) -> None:
    model = make_tiny_seeing_policy(tmp_path)
    module.check_weights(model, {})
    change_weights(tmp_path, lambda w: {k: v for k, v in w.items() if "layers.1.mlp.down_proj" not in k})
    with pytest.raises(GeneratorError, match=r"missing are 1: .*layers.1.mlp.down_proj.weight"):
        module.check_weights(model, {})
    module.check_weights(model, {"load_format": "dummy"})  # random weights are asked for


@pytest.mark.engine
def test_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter. Samples are the same whatever the batch; prefixes are continued, shared; faults are rows'."""
    for name, value in environment(CONFIG).items():  # the constructor sets them; the test takes them back
        monkeypatch.setenv(name, value)
    model = make_tiny_policy(tmp_path / "policy")
    merged = make_adapter(model, tmp_path / "adapter")
    engine = Generator(model, CONFIG.model_copy(update={"lora": str(tmp_path / "adapter")}))
    sampling = Sampling(temperature=1.0, top_k=0, max_tokens=24)
    prompts = [ChatPrompt(policy_messages(f"What is in picture {i}?")) for i in range(3)]

    async def together(order: list[int]) -> dict[int, list[Completion]]:
        found = await asyncio.gather(*(engine.generate(prompts[i], 16, 4096 * i, sampling) for i in order))
        return dict(zip(order, found, strict=True))

    async def work() -> None:
        greedy = Sampling(temperature=0.0, top_k=0, max_tokens=16)
        [told] = await engine.generate(prompts[0], 1, 0, greedy)
        ids = engine.token_ids(prompts[0])
        assert told.text == most_likely(merged, ids, model)
        assert told.text != most_likely(None, ids, model)

        first = await together([0, 1, 2])
        assert [c.seed for c in first[1]] == list(range(4096, 4112))
        assert len({c.text for c in first[1]}) > 1
        assert {c.finish_reason for c in first[1]} <= {"stop", "length"}
        assert await together([2, 1, 0]) == first
        alone = [await engine.generate(prompts[1], 1, 4096 + i, sampling) for i in range(4)]
        assert [c for [c] in alone] == first[1][:4]

        drawn = first[2]  # the third of its questions: what all share is there already
        length = len(engine.token_ids(prompts[2]))
        assert {(c.prompt_tokens, c.shareable_tokens) for c in drawn} == {(length, length // 32 * 32)}
        assert sum(c.cached_tokens for c in drawn) >= 15 * (length // 32 * 32)
        assert engine.statistics.hit_rate > 0.5
        assert engine.statistics.output_tokens > 0

        prefix = "Step 1: The lung is clear.\nStep 2:"
        begun = replace(prompts[0], prefix=prefix)
        assert str(engine._chat.tokenizer.decode(engine.token_ids(begun))).endswith(f"<|assistant|>{prefix}")
        constrained = Sampling(temperature=0.0, max_tokens=8, pattern="[01] (high|low)")
        [verdict] = await engine.generate(begun, 1, 0, constrained)
        assert verdict.text in ("0 high", "1 high", "0 low", "1 low")
        schema = {"type": "object", "properties": {"right": {"type": "boolean"}}, "required": ["right"]}
        [verdict] = await engine.generate(begun, 1, 0, Sampling(temperature=0.0, max_tokens=64, schema=schema))
        assert isinstance(json.loads(verdict.text)["right"], bool)
        vowels = tuple("aeiou")
        [ended_by] = await engine.generate(prompts[0], 1, 7, Sampling(temperature=1.0, max_tokens=64, stop=vowels))
        assert ended_by.finish_reason == "stop"
        assert [letter for letter in ended_by.text if letter in vowels] == [ended_by.text[-1]]

        with pytest.raises(RowError, match=r"prompt_too_long: \d+ prompt tokens"):
            await engine.generate(replace(begun, prefix="lung " * 300), 1, 0, sampling)

        def end() -> None:
            raise SystemExit

        monkeypatch.setattr(module, "end_process", end)
        engine.shutdown()
        monkeypatch.setattr(engine, "_engine", DeadEngine())
        with pytest.raises(module.GeneratorError, match="the vLLM engine died"):
            await engine.generate(prompts[0], 1, 0, sampling)
        monkeypatch.setattr(module, "in_actor", lambda: True)
        with pytest.raises(SystemExit):
            await engine.generate(prompts[0], 1, 0, sampling)

    asyncio.run(work())


@pytest.mark.engine
def test_a_real_engine_that_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is what transformers' model says; samples of a question share text and image in the cache."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = VllmEngine(max_model_len=512, dtype="float32", num_images=2)
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    folder = make_tiny_seeing_policy(tmp_path / "policy")
    engine = Generator(folder, config)
    pictures = [picture(0), picture(1, 60, 20)]
    messages = policy_messages("What is in this picture?")
    prompts = [ChatPrompt(messages, shown) for shown in ([], [pictures[0]], [pictures[1]], pictures)]
    reference: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor: Any = AutoProcessor
    processor = processor.from_pretrained(folder)

    def expected(prompt: ChatPrompt) -> str:
        text = engine._chat.tokenizer.decode(engine.token_ids(prompt))
        inputs = processor(text=text, images=list(prompt.images) or None, return_tensors="pt", add_special_tokens=False)
        assert inputs["input_ids"].shape[1] == engine.count(prompt)
        out = reference.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(out, skip_special_tokens=True))

    async def work() -> None:
        greedy = Sampling(temperature=0.0, top_k=0, max_tokens=12)
        told = [(await engine.generate(prompt, 1, 0, greedy))[0].text for prompt in prompts]
        assert told == [expected(prompt) for prompt in prompts]
        assert len(set(told)) == 4

        sampling = Sampling(temperature=1.0, top_k=0, max_tokens=12)
        first = await asyncio.gather(*(engine.generate(p, 8, 4096 * i, sampling) for i, p in enumerate(prompts)))
        again = [await engine.generate(p, 8, 4096 * i, sampling) for i, p in reversed(list(enumerate(prompts)))]
        assert again[::-1] == first
        seen = first[3][0]
        assert seen.prompt_tokens == engine.count(prompts[3])
        assert seen.shareable_tokens == 128 < seen.prompt_tokens  # the last block holds parts of both images
        assert sum(c.cached_tokens for c in again[0]) == 8 * seen.shareable_tokens
        engine.shutdown()

    asyncio.run(work())


def make_adapter(model: str, folder: Path) -> Any:
    """A random LoRA adapter on a checkpoint, and the model with the adapter merged in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config: Any = LoraConfig
    config = config(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload()


def most_likely(model: Any, ids: list[int], folder: str) -> str:
    """What a model (None: the one in the folder) continues greedily, 16 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = model or AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :]
    tokenizer: Any = AutoTokenizer
    return str(tokenizer.from_pretrained(folder).decode(out, skip_special_tokens=True))


class DeadEngine:
    """Stands for an engine whose processes were killed."""

    def generate(self, *arguments: Any, **named: Any) -> "DeadEngine":
        return self

    def __aiter__(self) -> "DeadEngine":
        return self

    async def __anext__(self) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        raise EngineDeadError()
