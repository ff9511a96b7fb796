"""GGUF files as llama.cpp's converter writes them: a Llama with its tokenizer, weights quantised or not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray

CONTROL, NORMAL = 3, 1
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: Any, tok: Any, kind: str = "Q8_0", add_bos: bool | None = True) -> Path:
    """`model` (a Llama with tied embeddings) and `tok`, matrices in `kind` where its blocks fit."""
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tok, add_bos)
    for name, values in _tensors(model).items():
        quantisation = GGMLQuantizationType[kind]
        if values.ndim == 2 and values.shape[1] % 32 == 0 and kind != "F32":
            writer.add_tensor(name, quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_tokenizer(writer: Any, tok: Any, add_bos: bool | None) -> None:
    backend = json.loads(tok.backend_tokenizer.to_str())
    added = {token["id"] for token in backend["added_tokens"]}
    vocabulary = sorted(tok.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if add_bos is not None else "llama-bpe")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([CONTROL if i in added else NORMAL for _, i in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.eos_token_id)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(tok.chat_template)


def _tensors(model: Any) -> dict[str, NDArray[np.float32]]:
    """The weights under llama.cpp's names, queries and keys in its order of rotary pairs."""
    config = model.config
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, tensor in model.state_dict().items():
        values: NDArray[np.float32] = tensor.float().numpy()
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            tensors["token_embd.weight" if "embed" in name else "output_norm.weight"] = values
        elif name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if part in heads:
                paired = values.reshape(heads[part], 2, -1, values.shape[1])
                values = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
            tensors[f"blk.{layer}.{_NAMES[part]}.weight"] = values
    return tensors
