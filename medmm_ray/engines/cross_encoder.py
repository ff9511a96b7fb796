"""A cross-encoder reads a query and a passage together, and says how well they fit: `CrossEncoder`.

Any checkpoint of transformers for sequence classification with one output (MedCPT's cross-encoder, MS MARCO's) or two
(not relevant, relevant); `path` as in `checkpoints.resolve`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.pretrained import load, load_tokenizer
from medmm_ray.engines.weights import WeightsError

MAX_TOKENS = 512


class CrossEncoder:
    """The model, in this process; a pair longer than `max_tokens` loses the end of its passage."""

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        max_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        folder = resolve(path)
        try:
            # Strict: a checkpoint without this head would get one of random weights.
            self._model: Any = load(AutoModelForSequenceClassification, folder).to(device).eval()
            self._tokenizer: Any = load_tokenizer(folder)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            hint = (
                " (a reranker is a checkpoint for sequence classification)" if isinstance(error, WeightsError) else ""
            )
            raise ConfigError(f"reranker {path} cannot be read: {error}{hint}") from error
        if self._model.config.num_labels not in (1, 2):
            raise ConfigError(
                f"reranker {path} has {self._model.config.num_labels} outputs; expected 1 (how relevant) or 2 (not "
                "relevant, relevant)"
            )
        # Some tokenizers say 10**30, and some models more positions than they were trained with.
        limits = (max_tokens or MAX_TOKENS, self._tokenizer.model_max_length, self._positions())
        self.max_tokens = min(limits)
        self.batch_size = batch_size

    def _positions(self) -> int:
        return int(
            getattr(
                self._model.config,
                "max_position_embeddings",
                MAX_TOKENS,
            )
        )

    def score(
        self,
        query: str,
        passages: Sequence[str],
    ) -> NDArray[np.float32]:
        """How well each passage fits the query, as log-odds; they depend on these passages alone."""
        import torch

        scores: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
        # Passages of like length together: a batch is as long as its longest.
        # The order is the passages' own, so that a rerun makes the same batches.
        order = np.argsort([len(passage) for passage in passages], kind="stable")
        for first in range(0, len(order), self.batch_size):
            some = [passages[i] for i in order[first : first + self.batch_size]]
            inputs = self._tokenizer(
                [query] * len(some),
                some,
                truncation="longest_first",
                max_length=self.max_tokens,
                padding=True,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                logits_NC = self._model(**inputs).logits.float().cpu().numpy()
            # With two outputs their difference is what one output is: log-odds of relevant.
            scores.append(logits_NC[:, -1] - (logits_NC[:, 0] if logits_NC.shape[1] == 2 else 0))
        scores_N = np.empty(len(passages), np.float32)
        scores_N[order] = np.concatenate(scores)
        return scores_N
