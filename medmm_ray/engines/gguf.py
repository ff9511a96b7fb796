"""Language models in GGUF files, as ordinary models with dequantised weights and their own tokenizer.

transformers reads both, but its tokenizer is not the one that the file describes: an added token with other characters
than a byte-level vocabulary's (Med-PRM's " ки") is spelled in bytes and never found in a text, a default token of GPT-2
is added behind the vocabulary, and no BOS is written where llama.cpp writes one. So it is put right here.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from medmm_ray.engines.dtype_device import Dtype
from medmm_ray.engines.pretrained import load
from medmm_ray.engines.weights import WeightsError, check_file

_ADDED = (3, 4)  # llama.cpp's token types CONTROL and USER_DEFINED
_BOS_UNLESS_SAID = ("llama-bpe", "llama3", "llama-v3")  # llama.cpp's tokenizers that write a BOS by default


def read_gguf(file: str | Path, dtype: Dtype, **options: Any) -> tuple[Any, Any]:
    """The causal language model in `file`, and its tokenizer; `options` as for transformers' ``from_pretrained``.

    Raises `WeightsError` (a ValueError) where the file is not whole or lacks weights of its model, OSError, ValueError
    or struct.error where it is no GGUF that transformers can read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    file = Path(file)
    tokenizer = _tokenizer(file, _fields(file))
    model = load(
        AutoModelForCausalLM, file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
        dtype=dtype, **options,
    )  # fmt: skip
    return model, tokenizer


def _fields(file: Path) -> Any:
    """What the file says besides its tensors, all of which must be there."""
    from gguf import GGUFReader

    check_file(file)
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise WeightsError(f"{file} is no GGUF file: it begins with {magic!r}")
    try:
        return GGUFReader(file).fields  # lays out every tensor, so that a missing end shows itself
    except (ValueError, IndexError, OverflowError) as error:
        raise WeightsError(
            f"{file} is not whole ({error}); its download was cut off or is still under way: get it again"
        ) from error


def _tokenizer(file: Path, fields: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:  # away from other tokenizer files that may lie beside it
        (Path(folder) / file.name).symlink_to(file.resolve())
        read = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)

    def said(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None

    tokens, kinds = said("tokens"), said("token_type") or []
    added = {i: tokens[i] for i, kind in enumerate(kinds) if kind in _ADDED}
    backend = json.loads(read.backend_tokenizer.to_str())
    backend["model"]["vocab"] = {added.get(i, token): i for token, i in backend["model"]["vocab"].items()}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < len(tokens)]
    special = {
        name: tokens[said(key)]
        for name, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if said(key) is not None
    }
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **special
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added.values()], True)
    tokenizer.chat_template = read.chat_template
    writes_bos = said("add_bos_token")
    if writes_bos is None:
        writes_bos = said("model") == "llama" or said("pre") in _BOS_UNLESS_SAID
    if writes_bos:
        _write_bos(tokenizer)
    return tokenizer


def _write_bos(tokenizer: Any) -> None:
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
