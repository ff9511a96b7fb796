"""Language models in GGUF files, as ordinary models with dequantised weights and their own tokenizer.

transformers reads the weights; three things it leaves undone are done here: the model is no longer marked as quantised
(else it cannot be saved), the tokenizer writes the BOS that llama.cpp would write, and added tokens that hold other
characters than a byte-level vocabulary's (Med-PRM's " ки") are one token again, with their own trained row.
"""

import json
from pathlib import Path
from typing import Any

import torch

_ADDED = (3, 4)  # llama.cpp's token types CONTROL and USER_DEFINED
_BOS_UNLESS_SAID = ("llama-bpe", "llama3", "llama-v3")  # llama.cpp's tokenizers that write a BOS by default


def read_gguf(file: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The causal language model in `file`, and its tokenizer; `options` as for transformers' ``from_pretrained``.

    Raises OSError or ValueError where the file is no GGUF that transformers can read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = Path(file).parent, Path(file).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=dtype, **options
    )
    return model, _completed(tokenizer, Path(file))


def _completed(tokenizer: Any, file: Path) -> Any:
    """The tokenizer with the added tokens and the BOS that the file says."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, processors
    from transformers import AddedToken

    fields = GGUFReader(file).fields

    def said(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None

    tokens, kinds = said("tokens"), said("token_type") or []
    added = [(token, i) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in _ADDED]
    lost = {i: token for token, i in added if token not in tokenizer.get_vocab()}
    if lost:  # spelled in bytes as if they were text, so that no text ever gives them
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = backend["model"]["vocab"]
        backend["model"]["vocab"] = {lost.get(i, token): i for token, i in vocabulary.items()}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
        tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False) for t in lost.values()], special_tokens=True
        )
    writes_bos = said("add_bos_token")
    if writes_bos is None:
        writes_bos = said("model") == "llama" or said("pre") in _BOS_UNLESS_SAID
    if writes_bos:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer
