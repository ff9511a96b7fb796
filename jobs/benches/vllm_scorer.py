"""vLLM as a scorer: the two rows of the head as a sequence classifier, pooled at every token (`token_classify`).

Its own step pooling cuts hidden dimensions before the head and cannot read the prefix cache; `token_classify` can where
it is asked to (``skip_reading_prefix_cache=False``; by default it does not). What comes back then are the tokens that
were not in the cache, from which the tags are picked.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model import RewardModel


def installed() -> bool:
    return find_spec("vllm") is not None


@contextlib.contextmanager
def vllm_scorer(model: "RewardModel", dtype: str, threads: int, longest: int) -> Iterator["VllmScorer"]:
    """An engine on a copy of `model` (a Llama) for sequences of up to `longest` tokens; stopped at the end."""
    from medmm_ray.engines.generator import GeneratorConfig, engine_arguments, environment

    config = GeneratorConfig(
        dtype=dtype, max_model_len=longest, num_threads=threads, num_gpus=float(model.device.type == "cuda"),
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    os.environ.update(environment(config))
    from vllm import LLM
    from vllm.config import PoolerConfig

    with tempfile.TemporaryDirectory() as folder:
        classifier(model).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        arguments = engine_arguments(folder, config)
        engine = LLM(runner="pooling", pooler_config=PoolerConfig(task="token_classify"), **arguments)
        try:
            yield VllmScorer(engine, model.family.ids["tag"])
        finally:
            engine.llm_engine.engine_core.shutdown()


def classifier(model: "RewardModel") -> Any:
    """A sequence classifier with the text tower's weights whose classes are the head's rows of − and +."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    text, signs = model.text_model, model.family.ids
    config = LlamaConfig(**{**text.config.to_dict(), "num_labels": 2, "architectures": None})
    with torch.device("meta"):
        made = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    head_VD = text.get_output_embeddings().weight
    made.model = text.model
    made.score = torch.nn.Linear(head_VD.shape[1], 2, bias=False)
    made.score.weight = torch.nn.Parameter(head_VD[[signs["minus"], signs["plus"]]].detach().clone())
    return made


class VllmScorer:
    """Log-odds at the tags of full sequences."""

    def __init__(self, engine: Any, tag: int) -> None:
        self.engine, self.tag = engine, tag

    def log_odds(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Every sequence is computed from its first token."""
        return [self._at_tags(row, output) for row, output in zip(rows, self._encode(rows, cached=False), strict=True)]

    def log_odds_cached(self, rows: Sequence[Sequence[int]], prefix: Sequence[int]) -> list[list[float]]:
        """`prefix`, with which all `rows` start and which holds no tag, is computed once, in a request of its own."""
        self.engine.reset_prefix_cache()
        self._encode([prefix], cached=True)
        return [self._at_tags(row, output) for row, output in zip(rows, self._encode(rows, cached=True), strict=True)]

    def _encode(self, rows: Sequence[Sequence[int]], cached: bool) -> list[Any]:
        from vllm import PoolingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        parameters = PoolingParams(use_activation=False, skip_reading_prefix_cache=not cached)
        outputs: list[Any] = self.engine.encode(
            prompts, pooling_task="token_classify", pooling_params=parameters, use_tqdm=False
        )
        return outputs

    def _at_tags(self, row: Sequence[int], output: Any) -> list[float]:
        logits_L2 = output.outputs.data
        offset = len(row) - len(logits_L2)  # tokens that were read from the cache have no row
        tags = [i - offset for i, token in enumerate(row) if token == self.tag]
        if min(tags) < 0:
            raise AssertionError(f"a tag at {min(tags) + offset} lies in the {offset} cached tokens")
        pair_T2 = logits_L2[tags].float()
        log_odds: list[float] = (pair_T2[:, 1] - pair_T2[:, 0]).tolist()
        return log_odds
