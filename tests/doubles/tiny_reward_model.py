"""A tiny random Llama with a small BPE tokenizer, and Med-PRM's own procedure on it (`medprm_reference`)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medmm_ray.reward_model import FusionConfig, RewardModel
from tests.doubles.clip_folders import write_native_clip
from tests.reward_model import medprm_reference

TAG = " ки"
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
WORDS = tuple(
    re.findall(
        r"\w+",
        "the left right lung shows an opacity effusion nodule heart is enlarged normal clear therefore answer option "
        "costophrenic angle blunted pneumothorax because no yes finding image question document guideline step",
    )
)
QUESTION = "Which lung shows the effusion? (A) left (B) right"
DOCUMENTS = ["a blunted costophrenic angle shows an effusion"]
SOLUTIONS = [
    ["the left angle is blunted", "therefore the answer is (A)"],
    ["the left angle is blunted", "no finding", "the answer is (B)"],
    ["normal"],
]


def corpus() -> list[str]:
    """Some text for the BPE: words in many orders, with the prompt's own."""
    lines = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(12)) for i in range(60)]
    prompt = medprm_reference.messages("Which? (A) a (B) b", "Step 1: one Step 2: two", ["text"])
    return [*lines, *(m["content"] for m in prompt), "a + b - c + d - e", "Step 1: 2: 3: 4: 5: 6: 7: 8: 9: 10:"] * 3


def tokenizer(
    tag: bool = True, own_bos: bool = False, more: Sequence[str] = (), vocab_size: int = 500
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that writes a BOS; with `own_bos` the chat template writes one too (two in all, as in Llama 3).

    `more`: text that it learns to encode well besides.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*corpus(), *more],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL)  # type: ignore[no-untyped-call]
    fast.chat_template = ("{{ bos_token }}" if own_bos else "") + TEMPLATE
    if tag:
        fast.add_tokens([TAG], special_tokens=True)
    return fast


def tag_id(tok: PreTrainedTokenizerFast) -> int:
    (found,) = tok(TAG, add_special_tokens=False)["input_ids"]
    return int(found)


def save(
    folder: Path,
    tag: bool = True,
    own_bos: bool = False,
    seed: int = 0,
    context: int = 2048,
    spread: float = 0.2,
    head_size: int = 8,
    fast: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A checkpoint folder of a random model: 3 layers, width 32, grouped keys, tied embeddings.

    `spread` is the weights' standard deviation: the larger, the further apart the scores, and rounding errors too.
    `head_size` is that of an attention head; vLLM's kernels for a CPU want a multiple of 32.
    `fast`: its tokenizer, by default `tokenizer(tag, own_bos)`.
    """
    fast = fast or tokenizer(tag, own_bos)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=spread, tie_word_embeddings=True,
        head_dim=head_size,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    return folder


def reference_probs(model: Any, tok: Any, question: str, steps: Sequence[str], documents: Sequence[str]) -> list[float]:
    """P(+) a step as Med-PRM computes it for the raw solution that `steps` stand for."""
    tagged = medprm_reference.processed(medprm_reference.numbered(steps))
    return medprm_reference.probs(model, tok, question, tagged, documents)


def two_tower(folder: Path) -> RewardModel:
    """`save`'s model with an image tower, in `folder` / "two_tower"; its fusion is opened, so that the image counts."""
    torch.manual_seed(3)
    model = RewardModel.from_pretrained(save(folder / "text"))
    model.add_image_tower(write_native_clip(folder / "tower"), FusionConfig(tokens="both", width=16, num_heads=2))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight, std=0.5)
    model.save_pretrained(folder / "two_tower")
    return model.eval()
