"""Tiny LLaVA and InternVL checkpoints of random weights, as published ones lie in a folder, and each one's own
procedure for a single solution: transformers' full forward with the pictures' pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from tests.doubles import tiny_reward_model as tiny
from tests.reward_model import medprm_reference

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
IMAGE_TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
# As the published templates do: a turn's images first, then its text.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE\n{% endif %}"
    "{% endfor %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|end|>\n"
    "{% endfor %}<|assistant|>\n"
)


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def save_llava(folder: Path, tower: str = "clip", context: int = 4096, **text: Any) -> Path:
    """With CLIP in the files of older checkpoints, with SigLIP in those that transformers writes now.

    `text` are changes to the language model's shape.
    """
    tok = tiny.tokenizer(tag=False)
    tok.add_tokens(["<image>"], special_tokens=True)
    tok.chat_template = TEMPLATE.replace("IMAGE", "<image>")
    torch.manual_seed(0)
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    config = LlavaConfig(
        vision_config=kind(image_size=16, patch_size=8, **IMAGE_TOWER),
        text_config=LlamaConfig(vocab_size=len(tok) + 8, max_position_embeddings=context, **{**TEXT, **text}),
        image_token_index=ids_of(tok, "<image>")[0],
        image_seq_length=4,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    model = LlavaForConditionalGeneration(config)
    _louder(model)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    if tower == "siglip":
        llava_processor(processor, tok, "full").save_pretrained(folder)
        return folder
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tok.chat_template}))
    tok.chat_template = None
    tok.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_processor(image_processor: Any, tok: PreTrainedTokenizerFast, strategy: str) -> Any:
    kind: Any = LlavaProcessor
    return kind(
        image_processor, tok, patch_size=8, vision_feature_select_strategy=strategy, chat_template=tok.chat_template,
        num_additional_image_tokens=int(strategy == "default"),
    )  # fmt: skip


def save_internvl(folder: Path, context: int = 2048) -> Path:
    tok = tiny.tokenizer(tag=False)
    tok.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tok.chat_template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(image_size=[16, 16], patch_size=[4, 4], **IMAGE_TOWER),
        text_config=LlamaConfig(vocab_size=len(tok) + 8, max_position_embeddings=context, **TEXT),
        image_token_id=ids_of(tok, "<IMG_CONTEXT>")[0],
        image_seq_length=4,
    )
    model = InternVLForConditionalGeneration(config)
    _louder(model)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4).save_pretrained(folder)
    return folder


def _louder(model: Any) -> None:
    """Random towers say nearly the same of every picture: let the projector speak up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)


def ids_of(tok: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    ids: list[int] = tok(text, add_special_tokens=special)["input_ids"]
    return ids


@torch.no_grad()
def llava_probs(
    model: Any, tok: Any, processor: Any, question: str, steps: Sequence[str], documents: Sequence[str],
    images: Sequence[Image.Image],
) -> list[float]:  # fmt: skip
    """P(+) a step, read at its tag, of the whole conversation with `LlavaProcessor`'s own image tokens."""
    tagged = medprm_reference.processed(medprm_reference.numbered(steps))
    system, user = medprm_reference.messages(question, tagged, documents)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system["content"]}]},
        {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": user["content"]}]},
    ]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = llava_processor(processor, tok, model.config.vision_feature_select_strategy)
    inputs = whole(text=text, images=list(images) or None, return_tensors="pt")
    (tag,), (plus,), (minus,) = (ids_of(tok, sign) for sign in (" ки", " +", " -"))
    logits = model(**inputs).logits[0]
    at = (inputs["input_ids"][0] == tag).nonzero()[:, 0]
    probs: list[float] = logits[at][:, [plus, minus]].softmax(dim=-1)[:, 0].tolist()
    return probs


@torch.no_grad()
def visualprm_probs(
    model: Any, tok: Any, processor: Any, system: str, question: str, steps: Sequence[str], documents: Sequence[str],
    images: Sequence[Image.Image],
) -> list[float]:  # fmt: skip
    """P(+) a step as VisualPRM's own code reads it: one conversation, the token before each "+"."""
    pixels, marks = [], []
    for image in images:
        tiles = processor(image, crop_to_patches=True, return_tensors="pt")["pixel_values"]
        pixels.append(tiles)
        marks.append(f"<img>{'<IMG_CONTEXT>' * 4 * len(tiles)}</img>\n")
    if len(marks) > 1:
        marks = [f"Image-{i}: {mark}" for i, mark in enumerate(marks, 1)]
    head = "".join(marks) + "".join(f"Document {i}: {text}\n\n" for i, text in enumerate(documents, 1))
    query = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, step in enumerate(steps):
        turn = f"### Question:\n{head}{question}\n\n### Solution Process:\n{step}" if i == 0 else step
        query += f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n"
    ids = ids_of(tok, query, special=True)
    ahead, turn_ids = (ids_of(tok, t) for t in ("<|im_start|>assistant\n", "<|im_start|>assistant\n+<|im_end|>\n"))
    reads = [i + len(ahead) - 1 for i in range(len(ids)) if ids[i : i + len(turn_ids)] == turn_ids]
    assert len(reads) == len(steps)
    inputs = {"pixel_values": torch.cat(pixels)} if pixels else {}
    logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0]
    signs = tok.convert_tokens_to_ids(["+", "-"])
    probs: list[float] = logits[reads][:, signs].softmax(dim=-1)[:, 0].tolist()
    return probs
