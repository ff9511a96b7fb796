"""vLLM's values at single tokens of whole sequences (its token-wise pooling), with its prefix cache in use.

Enters: token ids of sequences and the positions that are asked for. Leaves: for each sequence the pooled values at
those positions. A sequence that begins as another of the same call did is computed from there on: vLLM then returns the
computed tokens alone, and what is asked of its beginning is taken from the sequence that computed it.

Legend: L computed tokens, T positions asked for, W values a token.
"""

import itertools
import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from medmm_ray.engines.generator import Statistics
from medmm_ray.engines.vllm_engine import (
    GeneratorError,
    VllmEngine,
    check_free_memory,
    check_model,
    engine_arguments,
    engine_died,
    environment,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CPU_STEP_TOKENS = 4096  # of one engine step on a CPU, where no seeds forbid to chunk a longer prompt


@dataclass(frozen=True)
class Pooling:
    """What the engine returns for a token: a classifier's logits, or hidden states. `arguments` are vLLM's."""

    task: Literal["token_classify", "token_embed"]
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def classifier(cls, **arguments: Any) -> "Pooling":
        """The logits of a checkpoint's own head `score`, or of the one that ``hf_overrides`` make of its `lm_head`."""
        return cls("token_classify", {"convert": "classify", **arguments})

    @classmethod
    def difference(cls, plus: str, minus: str) -> "Pooling":
        """logit(`plus`) − logit(`minus`) of a causal language model, both tokens as they stand in its vocabulary.

        vLLM takes the difference of the two rows of `lm_head` in float32 at load, so that no classifier is written.
        """
        head = {"classifier_from_token": [minus, plus], "method": "from_2_way_softmax"}
        return cls.classifier(hf_overrides=head)

    @classmethod
    def states(cls, architecture: str, module: str) -> "Pooling":
        """Hidden states, in the model's own number format, by the class `architecture` of `module`.

        `architecture` stands in for the checkpoint's own. vLLM registers it for the whole process, so it must not be
        the name of an architecture that other engines load.
        """
        overrides = {"head_dtype": "model", "architectures": [architecture]}
        classes = {architecture: f"{module}:{architecture}"}
        return cls("token_embed", {"convert": "embed", "hf_overrides": overrides, "model_class_overrides": classes})


@dataclass(frozen=True)
class TokenSequence:
    """A sequence's token ids, and the positions in it whose values are asked for."""

    ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class PooledTokens:
    """What vLLM returned for one sequence: the values of its last tokens, from the position `start` on."""

    values_LW: "Tensor"
    start: int


class TokenPooler:
    """A vLLM engine over one checkpoint that pools at tokens."""

    def __init__(self, model: str, config: VllmEngine, pooling: Pooling) -> None:
        check_model(model)
        check_free_memory(model, config)
        os.environ.update(environment(config))
        from vllm import LLM
        from vllm.config import PoolerConfig

        self.pooling = pooling
        self.statistics = Statistics()
        self._salts = itertools.count()
        pooler = PoolerConfig(task=pooling.task, tok_pooling_type="ALL")
        arguments = pooler_arguments(model, config) | pooling.arguments
        try:
            self._engine = LLM(runner="pooling", pooler_config=pooler, **arguments)
        except RuntimeError as error:  # of the engine's process, whose log has the reason
            raise GeneratorError(
                f"vLLM cannot start on {model} with max_model_len {config.max_model_len}: {error}; its log above says "
                "why. Where the key-value cache is too small for one sequence of that length, lower "
                "vllm={max_model_len: ...}, or raise gpu_memory_utilization (on a CPU kv_cache_gib)"
            ) from error

    def values(self, sequences: Sequence[TokenSequence], cached: bool = True) -> "list[Tensor]":
        """For each sequence its values at its positions, in order [T, W]. Not `cached`: each is computed as a whole.

        Raises `GeneratorError` where the engine is dead (an actor's process ends), or leaves tokens out.
        """
        if not sequences:
            return []
        # A salt of their own: what an earlier call has cached is not in this one's answers.
        salt = f"call-{next(self._salts)}" if cached else None
        computed = self._encode([sequence.ids for sequence in sequences], salt)
        values = gather_values(sequences, computed)
        incomplete = [i for i, values_TW in enumerate(values) if values_TW is None]
        if incomplete:
            log.warning(
                "vLLM left out tokens of %d of %d sequences; they are computed anew", len(incomplete), len(sequences)
            )
            retried = [sequences[i] for i in incomplete]
            computed = self._encode([sequence.ids for sequence in retried], None)
            for i, values_TW in zip(incomplete, gather_values(retried, computed), strict=True):
                values[i] = values_TW
        if any(values_TW is None for values_TW in values):
            raise GeneratorError("vLLM returned fewer tokens than it was given, without its prefix cache too")
        return cast("list[Tensor]", values)

    def _encode(self, rows: Sequence[Sequence[int]], salt: str | None) -> list[PooledTokens | None]:
        """The pooled tokens of each row; None where their number is not what vLLM says. No `salt`: no prefix cache."""
        from vllm import PoolingParams, TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = PoolingParams(use_activation=False, skip_reading_prefix_cache=salt is None)
        prompts = [TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        if salt is not None:
            for prompt in prompts:
                prompt["cache_salt"] = salt
        try:
            outputs = self._engine.encode(
                prompts, pooling_params=parameters, pooling_task=self.pooling.task, use_tqdm=False
            )
        except EngineDeadError as error:
            engine_died(error)
        computed: list[PooledTokens | None] = []
        for row, output in zip(rows, outputs, strict=True):
            values_LW, start = output.outputs.data, output.num_cached_tokens
            self.statistics.prompt_tokens += len(row)
            self.statistics.cached_tokens += start
            is_whole = start + len(values_LW) == len(row)
            computed.append(PooledTokens(values_LW, start) if is_whole else None)
        return computed

    def shutdown(self) -> None:
        """Stop the engine's processes (an actor's end does it too)."""
        self._engine.llm_engine.engine_core.shutdown()


def pooler_arguments(model: str, config: VllmEngine) -> dict[str, Any]:
    """vLLM's arguments: those of generation, but prompts may be chunked, as nothing is drawn with a seed."""
    chunked = {} if config.num_gpus else {"enable_chunked_prefill": True, "max_num_batched_tokens": CPU_STEP_TOKENS}
    return engine_arguments(model, config) | chunked | config.vllm


def gather_values(sequences: Sequence[TokenSequence], computed: Sequence[PooledTokens | None]) -> "list[Tensor | None]":
    """Each sequence's values at its positions [T, W], from its own computed tokens or from an equal beginning's.

    A state depends on the tokens up to its own alone, so any sequence with the same ones has it. None where no sequence
    has computed one of the positions.
    """

    picked: list[Tensor | None] = []
    sources = _Sources(sequences, computed)
    for i, sequence in enumerate(sequences):
        own_tokens = computed[i]
        if own_tokens is not None and own_tokens.start <= min(sequence.positions):
            rows = [position - own_tokens.start for position in sequence.positions]
            picked.append(own_tokens.values_LW[rows])
        else:
            picked.append(sources.values(i))
    return picked


class _Sources:
    """The sequences of a call by their beginnings, to take a token's values from any that computed it."""

    def __init__(self, sequences: Sequence[TokenSequence], computed: Sequence[PooledTokens | None]) -> None:
        self.sequences = sequences
        self.computed = computed
        # As bytes: comparing two beginnings is then one comparison of memory.
        self.texts = [array("i", sequence.ids).tobytes() for sequence in sequences]

    def values(self, i: int) -> "Tensor | None":
        """The values [T, W] at a sequence's positions; None where one of them was computed by no sequence."""
        import torch

        rows_W: list[Tensor] = []
        for position in self.sequences[i].positions:
            source = self._source_of(i, position)
            if source is None:
                return None
            rows_W.append(source.values_LW[position - source.start])
        return torch.stack(rows_W)

    def _source_of(self, i: int, position: int) -> PooledTokens | None:
        """The tokens of the sequence itself, else of the first with the same beginning up to `position`."""
        own_tokens = self.computed[i]
        if own_tokens is None or own_tokens.start <= position:
            return own_tokens
        beginning = self.texts[i][: (position + 1) * array("i").itemsize]
        for text, tokens in zip(self.texts, self.computed, strict=True):
            if tokens is not None and tokens.start <= position and text.startswith(beginning):
                return tokens
        return None
