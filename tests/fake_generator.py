"""What the tests of steps that generate text use in place of vLLM: a scripted engine, and a tiny real checkpoint."""

from collections.abc import Callable
from pathlib import Path

from medmm_ray.engines.generator import Completion, GeneratorConfig, Prompt, Sampling, Statistics

Script = Callable[[str, int], str]


class FakeGenerator:
    """Answers ``script(prompt text, seed)``; a prompt's tokens are its characters. A text that ends in ~ is cut off."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.statistics = Statistics()
        self.requests: list[tuple[str, int, int]] = []

    def __call__(self, model: str, config: GeneratorConfig) -> "FakeGenerator":
        return self

    def count(self, prompt: Prompt) -> int:
        return len(text_of(prompt))

    async def generate(self, prompt: Prompt, n: int, seed: int, how: Sampling) -> list[Completion]:
        asked = text_of(prompt)
        self.requests.append((asked, n, seed))
        texts = [self.script(asked, seed + i) for i in range(n)]
        return [Completion(t, "length" if t.endswith("~") else "stop", seed + i, len(t)) for i, t in enumerate(texts)]


def text_of(prompt: Prompt) -> str:
    """The last message and what the assistant has said after it."""
    return prompt.messages[-1]["content"] + prompt.said


def make_tiny_policy(folder: Path) -> str:
    """A random two-layer Llama with a small tokenizer of its own, as a checkpoint folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medmm_ray.engines.tokenizer import build_tokenizer

    text = "Step 1: The lung is clear.\nStep 2: The heart is large, so the answer is (B)."
    tokenizer = build_tokenizer([text] * 4, vocab_size=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(shape)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return str(folder)
