"""A reward model whose text tower is run by vLLM: the checkpoint's own format, documents and errors, vLLM's numbers.

Enters: a checkpoint and an engine's settings. Leaves: a `PooledRewardModel`, which scores as `RewardModel` does, to
rounding: what is read, and what is refused, is decided by the same code.

Legend: T tags, D text width, W values a token.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from medmm_ray.engines.generator import GeneratorConfig
from medmm_ray.engines.reward_model import checkpoint, text_tower
from medmm_ray.engines.reward_model.errors import CheckpointError
from medmm_ray.engines.reward_model.model import RewardModel, SolutionStates, _Reading
from medmm_ray.engines.reward_model.packing import Branch, PackedQuestion
from medmm_ray.engines.reward_model.request import ScoreRequest
from medmm_ray.engines.token_pooler import Pooling, TokenPooler, TokenSequence

QUESTIONS = 32  # that are handed to the engine in one call
VOCABULARY_PADDING = 64  # rows; vLLM rounds a vocabulary up to a multiple of it before it is dealt to GPUs


class Pooler(Protocol):
    """What a `PooledRewardModel` needs of an engine; a fake of it makes a unit test whole."""

    def values(self, sequences: Sequence[TokenSequence]) -> list[Tensor]: ...

    def shutdown(self) -> None: ...


StartPooler = Callable[[str, GeneratorConfig, Pooling], Pooler]


class PooledRewardModel(RewardModel):
    """A reward model of texts whose text tower's weights are an engine's alone: here it is on the meta device.

    It gives log-odds, no states, so it has no image part; it can be neither trained nor saved.
    """

    def __init__(self, text: text_tower.Text, longest: int) -> None:
        """`longest`: tokens of the longest sequence that the engine takes."""
        super().__init__(text.model, text.tokenizer, family=text.family)
        self.text_origin = text.origin
        self.longest = longest
        self.pooler: Pooler | None = None

    @classmethod
    def open(cls, path: "str | Path", config: GeneratorConfig, start: StartPooler = TokenPooler) -> "PooledRewardModel":
        """The reward model of `path`, a folder or a hub id, with an engine of its own; `shutdown` ends that.

        Sequences are as long as the checkpoint's context, or ``max_model_len`` of `config` where that is less. Raises
        `CheckpointError` where vLLM cannot read such a checkpoint, `GeneratorError` where its engine cannot start.
        """
        path = checkpoint.locate(path, None)
        saved = checkpoint.read(path)
        model = cls(text_tower.read_outline(path, saved.family if saved else None), config.max_model_len)
        if saved is not None:
            model.max_length, model.reserve, model.fit = saved.max_length, saved.reserve, saved.fit
        pooling = model.pooling(config)
        settings = config.model_copy(update={"max_model_len": model.context})
        with tempfile.TemporaryDirectory(prefix="text-tower-") as scratch:
            model.pooler = start(_text_tower_alone(path, Path(scratch)), settings, pooling)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def context(self) -> int:
        return min(super().context, self.longest)

    def pooling(self, config: GeneratorConfig) -> Pooling:
        """How vLLM reads the family's head."""
        match self.family.name:
            case "medprm" | "math_shepherd":
                signs = [self.family.ids["plus"], self.family.ids["minus"]]
                _check_shard(self.text_model.config.vocab_size, signs, config.tensor_parallel_size)
                plus, minus = self.tokenizer.convert_ids_to_tokens(signs)
                return Pooling.difference(plus, minus)
            case "qwen_prm":  # vLLM has its class, by the name of the published checkpoint's
                return Pooling.classifier(hf_overrides={"architectures": ["Qwen2ForProcessRewardModel"]})
            case "token_classification" | "meds3":
                return Pooling.classifier()
        raise CheckpointError(
            f"vLLM reads no reward model of the family {self.family.name} here; take engine=torch, which does"
        )

    def text_states_of(
        self,
        requests: Iterable[ScoreRequest],
        *,
        token_budget: int | None = None,  # noqa: ARG002 - the engine's own scheduler decides
        together: bool = True,  # noqa: ARG002
    ) -> Iterator[list[SolutionStates]]:
        """The log-odds of many questions' solutions, in order, without states.

        What the engine reads together is its own choice, and the last bits of a log-odds depend on it.
        """
        waiting = iter(requests)
        while batch := list(islice(waiting, QUESTIONS)):
            readings = [_Reading(self, request) for request in batch]
            branches = [(r, group, b) for r in readings for group in r.packing.groups for b in group.branches]
            for (reading, group, branch), log_odds_T in zip(branches, self._log_odds(branches), strict=True):
                reading.found[branch.solution] = self._found(group, log_odds_T)
            yield from (reading.states() for reading in readings)

    def _log_odds(self, branches: Sequence[tuple[Any, PackedQuestion, Branch]]) -> list[Tensor]:
        assert self.pooler is not None
        sequences = [_sequence(group, branch) for _, group, branch in branches]
        return [_difference(values_TW.float()) for values_TW in self.pooler.values(sequences)]

    def _found(self, group: PackedQuestion, log_odds_T: Tensor) -> SolutionStates:
        missing = int((~log_odds_T.isfinite()).sum())
        if missing:
            return self.no_states(f"not_finite: {missing} of {len(log_odds_T)} steps have no finite score")
        empty_0D = torch.zeros(0, self.hidden_size)
        return SolutionStates(empty_0D, empty_0D, log_odds_T, num_documents=group.num_documents)

    def shutdown(self) -> None:
        """Stop the engine."""
        if self.pooler is not None:
            self.pooler.shutdown()


def _sequence(group: PackedQuestion, branch: Branch) -> TokenSequence:
    prefix = len(group.prefix_ids)
    return TokenSequence([*group.prefix_ids, *branch.ids], [prefix + tag for tag in branch.tags])


def _difference(values_TW: Tensor) -> Tensor:
    """Log-odds [T] from two classes' logits, or as they are."""
    return values_TW[:, 0] if values_TW.shape[1] == 1 else values_TW[:, 1] - values_TW[:, 0]


def _check_shard(vocabulary: int, signs: Sequence[int], gpus: int) -> None:
    """Raise where a sign's row of the head is not on the first GPU, which is where vLLM takes both from."""
    rows = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING // gpus
    if max(signs) >= rows:
        raise CheckpointError(
            f"tensor_parallel_size={gpus} gives the first GPU {rows} rows of the head, and the signs' tokens are "
            f"{list(signs)}; vLLM makes the classifier of that GPU's rows: take fewer GPUs an engine"
        )


def _text_tower_alone(path: "str | Path", scratch: Path) -> str:
    """`path`, or where the image part's weights lie beside the text tower's, which vLLM would load too, links to the
    rest."""
    folder = Path(path)
    if not (folder / checkpoint.FUSION).is_file():
        return str(path)
    for file in folder.iterdir():
        if file.is_file() and file.name != checkpoint.FUSION:
            (scratch / file.name).symlink_to(file.resolve())
    return str(scratch)
