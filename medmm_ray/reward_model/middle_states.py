"""vLLM's language models as their processes load them to give two states a token: after the final norm, and entering
the middle layer, side by side.

What enters: the checkpoint's `architectures`, overridden by a name of this module (vLLM's registry is one for a whole
process: a class under an architecture's usual name would be every later engine's too). Each is vLLM's class with the
middle layer as an auxiliary output, which vLLM has for speculative decoding.

Legend: L tokens of an engine step, D text width.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.llama import LlamaForCausalLM as VllmLlama
from vllm.model_executor.models.mistral import MistralForCausalLM as VllmMistral
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM as VllmQwen2
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM as VllmQwen3


class _MiddleBeside:
    """The first base of a class: what its forward pass gives becomes [L, 2 D]."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model: Any = self
        model.set_aux_hidden_state_layers((vllm_config.model_config.hf_text_config.num_hidden_layers // 2,))

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Both states of each token side by side."""
        forward: Any = super().forward  # type: ignore[misc]
        states_LD, (middle_LD,) = forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        return torch.cat([states_LD, middle_LD], dim=-1)


class LlamaMiddleStates(_MiddleBeside, as_embedding_model(VllmLlama)):  # type: ignore[misc]
    pass


class MistralMiddleStates(_MiddleBeside, as_embedding_model(VllmMistral)):  # type: ignore[misc]
    pass


class Qwen2MiddleStates(_MiddleBeside, as_embedding_model(VllmQwen2)):  # type: ignore[misc]
    pass


class Qwen3MiddleStates(_MiddleBeside, as_embedding_model(VllmQwen3)):  # type: ignore[misc]
    pass
