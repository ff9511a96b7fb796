"""Tiny CLIPs of random weights, written as the folders that people really have."""

from pathlib import Path
from typing import Any

import torch

from medmm_ray.engines.image_tower import save_open_clip

WORDS = ["normal", "chest", "effusion", "left", "right", "lung", "nodule", "the", "is", "a"]


def word_tokenizer() -> Any:
    """A tokenizer of whole words with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return fast(tokenizer_object=tokenizer, **special)


def native_config() -> dict[str, Any]:
    """open_clip's own transformers on both sides: the form that the phantoms' tower has."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 12},
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 14,
            "width": 24,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "local",
            "pool_type": "eos",
            "eos_id": 3,
            "pad_id": 0,
        },
    }


def write_native_clip(folder: Path) -> Path:
    """A folder of open_clip's own format; weights are the same each time."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**native_config())
    save_open_clip(folder, native_config(), model.state_dict(), word_tokenizer())
    return folder


def write_biomed_clip(folder: Path, weights_file: str = "open_clip_pytorch_model.bin") -> Path:
    """BiomedCLIP's classes in small: timm's ViT, BERT with an MLP projection, weights in torch's format."""
    import json

    import open_clip
    from transformers import BertConfig

    bert = BertConfig(
        vocab_size=14,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    text_folder = folder / "bert"
    bert.save_pretrained(text_folder)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 160,
        },
        "text_cfg": {
            "hf_model_name": str(text_folder),
            "hf_tokenizer_name": "local",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_model_pretrained": False,
            "context_length": 32,
        },
    }
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config)
    word_tokenizer().save_pretrained(folder)
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.save(model.state_dict(), folder / weights_file)
    return folder
