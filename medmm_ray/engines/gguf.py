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

_ADDED_TYPES = (3, 4)  # llama.cpp's token types CONTROL and USER_DEFINED
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3")  # llama.cpp's tokenizers that write a BOS by default
_SPECIAL_TOKENS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
"""GGUF's fields of special tokens, by transformers' names for them."""


def read_gguf(file: str | Path, dtype: Dtype, **options: Any) -> tuple[Any, Any]:
    """The causal language model in `file`, and its tokenizer; `options` as for transformers' ``from_pretrained``.

    Raises `WeightsError` (a ValueError) where the file is not whole or lacks weights of its model, OSError, ValueError
    or struct.error where it is no GGUF that transformers can read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    file = Path(file)
    tokenizer = _tokenizer(file, _fields(file))
    model = load(
        AutoModelForCausalLM,
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        **options,
    )
    return model, tokenizer


def _fields(file: Path) -> Any:
    """The metadata of the file; all of its tensors must be there."""
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
    """The tokenizer that the file describes: transformers' reading of it, put right."""
    from tokenizers import Tokenizer
    from transformers import AddedToken, PreTrainedTokenizerFast

    tokens = _value(fields, "tokens")
    token_types = _value(fields, "token_type") or []
    added_tokens = {i: tokens[i] for i, token_type in enumerate(token_types) if token_type in _ADDED_TYPES}
    as_read = _read_by_transformers(file)
    backend = json.loads(as_read.backend_tokenizer.to_str())
    # An added token is spelled in bytes there: it gets its own spelling. What GPT-2 adds behind the vocabulary goes.
    vocabulary = backend["model"]["vocab"]
    backend["model"]["vocab"] = {added_tokens.get(i, token): i for token, i in vocabulary.items()}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < len(tokens)]
    special_tokens: dict[str, str] = {}
    for name, key in _SPECIAL_TOKENS.items():
        token_id = _value(fields, key)
        if token_id is not None:
            special_tokens[name] = tokens[token_id]
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **special_tokens
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added_tokens.values()], True)
    tokenizer.chat_template = as_read.chat_template
    if _writes_bos(fields):
        _write_bos(tokenizer)
    return tokenizer


def _value(fields: Any, key: str) -> Any:
    """A field of the tokenizer's metadata; None where the file has none."""
    name = f"tokenizer.ggml.{key}"
    return fields[name].contents() if name in fields else None


def _read_by_transformers(file: Path) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # away from other tokenizer files that may lie beside it
        (Path(folder) / file.name).symlink_to(file.resolve())
        return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def _writes_bos(fields: Any) -> bool:
    """Whether llama.cpp would write a BOS before a text: as the file says, else by the kind of its tokenizer."""
    writes_bos = _value(fields, "add_bos_token")
    if writes_bos is None:
        return _value(fields, "model") == "llama" or _value(fields, "pre") in _BOS_BY_DEFAULT
    return bool(writes_bos)


def _write_bos(tokenizer: Any) -> None:
    """Have the tokenizer begin every text with its BOS."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
