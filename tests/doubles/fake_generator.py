"""What the tests of steps that generate text use in place of vLLM: a scripted engine, and a tiny real checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling, Statistics
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.train.policy import LlamaShape, new_llama

Script = Callable[[str, int], str]


class FakeGenerator:
    """Answers ``script(prompt text, seed)``; a text that ends in ~ is cut off.

    Tokens are characters, cached in blocks of 8: all samples of a request but the first find the prompt's there.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.statistics = Statistics()
        self.requests: list[tuple[str, int, int]] = []
        self.figures: list[dict[str, float]] = []  # for a test to keep what the step said of its rows

    def __call__(self, model: str, config: VllmEngine) -> "FakeGenerator":
        return self

    def count(self, prompt: ChatPrompt) -> int:
        return len(text_of(prompt))

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        asked = text_of(prompt)
        self.requests.append((asked, n, seed))
        texts = [self.script(asked, seed + i) for i in range(n)]
        length = len(asked)
        return [
            Completion(
                text, "length" if text.endswith("~") else "stop", seed + i, len(text),
                prompt_tokens=length, shareable_tokens=length // 8 * 8, cached_tokens=length // 8 * 8 if i else 0,
            )
            for i, text in enumerate(texts)
        ]  # fmt: skip


def text_of(prompt: ChatPrompt) -> str:
    """The last message and what the assistant has said after it."""
    return prompt.messages[-1]["content"] + prompt.prefix


def make_tiny_policy(folder: Path) -> str:
    """A random two-layer Llama with a small tokenizer of its own, as a checkpoint folder. It writes words alone."""
    text = "Step 1: The lung is clear.\nStep 2: The heart is large, so the answer is (B)."
    shape = LlamaShape(
        hidden_size=128, intermediate_size=256, num_layers=2, max_length=512, vocab_size=512, tie_embeddings=False
    )
    model, tokenizer = new_llama(shape, [text] * 4, seed=0)
    words_only(model.lm_head, tokenizer)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


SEEING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "<|assistant|>\n"
)


def make_tiny_seeing_policy(folder: Path) -> str:
    """A random two-layer Qwen2-VL, whose template, as the published one, keeps the order of text and images."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    from tests.doubles import tiny_reward_model

    tokenizer = tiny_reward_model.tokenizer(tag=False)
    marks = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_tokens([f"<|{mark}|>" for mark in marks], special_tokens=True)
    ids: dict[str, Any] = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in marks}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128, "patch_size": 4, "mlp_ratio": 2,
            "initializer_range": 0.2,
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    model: Any = Qwen2VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    words_only(model.lm_head, tokenizer)
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}  # pixels, not edges
    pictures, films = Qwen2VLImageProcessorPil(patch_size=4, size=size), Qwen2VLVideoProcessor(patch_size=4, size=size)
    processor: Any = Qwen2VLProcessor
    processor(pictures, tokenizer, films, chat_template=SEEING_TEMPLATE).save_pretrained(folder)
    return str(folder)


def words_only(head: Any, tokenizer: Any) -> None:
    """Let a random model's most likely token never be special or half a letter: texts can then be compared."""
    import torch

    with torch.no_grad():
        for token in range(head.weight.shape[0]):
            text = tokenizer.decode([token])
            if not text.isascii() or not text.strip().isalpha():
                head.weight[token] = 0
