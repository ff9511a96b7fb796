"""A reward model whose text tower is run by vLLM: the checkpoint's own format, documents and errors, vLLM's numbers.

Enters: a checkpoint and an engine's settings. Leaves: a `PooledRewardModel`, which scores as `RewardModel` does, to
rounding: what is read, and what is refused, is decided by the same code. For the image part, or where states are kept,
the engine gives two states a token instead of log-odds (`middle_states`), and head and fusion work on them here.

Legend: T tags, D text width, W values a token.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from medmm_ray.engines.token_pooler import Pooling, TokenPooler, TokenSequence
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.reward_model import checkpoint, text_tower
from medmm_ray.reward_model.errors import CheckpointError
from medmm_ray.reward_model.model import RewardModel
from medmm_ray.reward_model.packing import Branch, PackedQuestion
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates
from medmm_ray.reward_model.scoring_job import ScoringJob

QUESTIONS = 32  # that are handed to the engine in one call …
STATES_QUESTIONS = 2  # … and where it gives states: 16 KB a token of an 8B model in bfloat16
MIDDLE_STATES = "medmm_ray.reward_model.middle_states"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
VOCABULARY_PADDING = 64  # rows; vLLM rounds a vocabulary up to a multiple of it before it is dealt to GPUs


class Pooler(Protocol):
    """What a `PooledRewardModel` needs of an engine; a fake of it makes a unit test whole."""

    def values(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """What the engine says of each sequence at its positions [T, W]."""

    def shutdown(self) -> None:
        """Stop the engine."""


StartPooler = Callable[[str, VllmEngine, Pooling], Pooler]


class PooledRewardModel(RewardModel):
    """A reward model whose text tower's weights are an engine's alone: here it is on the meta device.

    It can be neither trained nor saved. Without `gives_states` it has log-odds alone, and no image part.
    """

    def __init__(self, text: text_tower.TextTower, config: VllmEngine, gives_states: bool) -> None:
        super().__init__(text.model, text.tokenizer, family=text.family)
        self.text_origin = text.origin
        self.config, self.gives_states = config, gives_states
        self.head_D: Tensor | None = None  # the head's row of + less that of −, float32
        self.pooler: Pooler | None = None

    @classmethod
    def open(
        cls, path: "str | Path", config: VllmEngine, *, states: bool = False, start: StartPooler = TokenPooler
    ) -> "PooledRewardModel":
        """The reward model of `path`, a folder or a hub id, with an engine of its own; `shutdown` ends that.

        Sequences are as long as the checkpoint's context, or ``max_model_len`` of `config` where that is less. With
        `states`, states and summaries come too, and the image part, where there is one. Raises `CheckpointError` where
        vLLM cannot read such a checkpoint, `GeneratorError` where its engine cannot start.
        """
        path = checkpoint.locate(path, None)
        saved = checkpoint.read(path)
        text = text_tower.load_without_weights(path, saved.family if saved else None, config.dtype)
        model = cls(text, config, states)
        pooling = model.pooling()
        if states:
            pair_ids = [model.family.ids["plus"], model.family.ids["minus"]]
            plus_D, minus_D = text_tower.load_head_rows(path, text.model, pair_ids).float()
            model.head_D = plus_D - minus_D
        # As long as any packed sequence can be, and no longer.
        settings = config.model_copy(update={"max_model_len": model.context})
        with tempfile.TemporaryDirectory(prefix="text-tower-") as scratch:
            model.pooler = start(_text_tower_alone(path, Path(scratch)), settings, pooling)
        if saved is not None:
            # An engine without states has nothing for a fusion to work on.
            model.restore(path, saved if states else replace(saved, fusion=None))
        if model.image_tower is not None and model.fusion is not None:
            model.image_tower.to(model.device)
            model.fusion.to(model.device)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where the image part works."""
        return torch.device("cuda" if self.config.num_gpus else "cpu")

    @property
    def context(self) -> int:
        """Tokens of the longest sequence: the checkpoint's, or what the engine is bounded to."""
        return min(super().context, self.config.max_model_len)

    def pooling(self) -> Pooling:
        """How vLLM reads the checkpoint."""
        name, model = self.family.name, self.text_model.config
        if self.gives_states:
            (architecture,) = model.architectures
            if not self.family.additive or architecture not in ARCHITECTURES:
                raise CheckpointError(
                    f"vLLM gives the states of the families medprm and math_shepherd on {', '.join(ARCHITECTURES)}; "
                    f"this is a {architecture} of the family {name}: take engine=torch"
                )
            return Pooling.states(architecture.replace("ForCausalLM", "MiddleStates"), MIDDLE_STATES)
        if name == "qwen_prm":  # vLLM has its class, by the name of the published checkpoint's
            return Pooling.classifier(hf_overrides={"architectures": ["Qwen2ForProcessRewardModel"]})
        if not self.family.additive:  # a head `score` in the checkpoint
            return Pooling.classifier()
        pair_ids = [self.family.ids["plus"], self.family.ids["minus"]]
        _check_shard(model.vocab_size, pair_ids, self.config.tensor_parallel_size)
        plus, minus = self.tokenizer.convert_ids_to_tokens(pair_ids)
        return Pooling.difference(plus, minus)

    def head_log_odds(self, states_TD: Tensor) -> Tensor:
        """As `RewardModel.head_log_odds`, with the two rows of the head that are read from the checkpoint's files."""
        if self.head_D is None:
            raise ValueError("this reward model was opened without states; open it with states=True")
        return states_TD.float() @ self.head_D.to(states_TD.device)

    def iter_states(
        self,
        requests: Iterable[ScoreRequest],
        *,
        token_budget: int | None = None,  # noqa: ARG002 - the engine's own scheduler decides
        together: bool = True,  # noqa: ARG002
    ) -> Iterator[tuple[ScoreRequest, list[SolutionStates]]]:
        """Each request with what the engine says of its solutions, in order.

        What it computes together is its own choice, and the last bits of a log-odds depend on it.
        """
        pending = iter(requests)
        batch_size = STATES_QUESTIONS if self.gives_states else QUESTIONS
        while batch := list(islice(pending, batch_size)):
            jobs = [self.scoring_job(request) for request in batch]
            self._run(jobs)
            for job in jobs:
                yield job.request, job.states()

    def _run(self, jobs: Sequence[ScoringJob]) -> None:
        """Hand all branches of some jobs to the engine, and note in the jobs what comes of each."""
        assert self.pooler is not None
        branches: list[tuple[ScoringJob, PackedQuestion, Branch]] = []
        for job in jobs:
            for group in job.packing.groups:
                branches += [(job, group, branch) for branch in group.branches]
        sequences = [self._sequence(group, branch) for _, group, branch in branches]
        for (job, group, branch), values_LW in zip(branches, self.pooler.values(sequences), strict=True):
            job.add(branch, self._states(group, branch, values_LW))

    def _sequence(self, group: PackedQuestion, branch: Branch) -> TokenSequence:
        """A branch with its prefix, and where its values are wanted: at its tags, or for states at all tokens of its
        steps, as a summary is a mean over them."""
        prefix = len(group.prefix_ids)
        ids = [*group.prefix_ids, *branch.ids]
        if self.gives_states:
            return TokenSequence(ids, range(_first_token(group, branch), len(ids)))
        return TokenSequence(ids, [prefix + tag for tag in branch.tags])

    def _states(self, group: PackedQuestion, branch: Branch, values_LW: Tensor) -> SolutionStates:
        """What the engine's values of a branch are: states, summaries and log-odds, or log-odds alone."""
        if self.gives_states:
            states_TD, summaries_TD = self._split_values(group, branch, values_LW)
            log_odds_T = self.head_log_odds(states_TD)
            finite_T = log_odds_T.isfinite() & states_TD.isfinite().all(dim=1) & summaries_TD.isfinite().all(dim=1)
        else:
            states_TD = summaries_TD = torch.zeros(0, self.hidden_size)
            log_odds_T = _log_odds(values_LW.float())
            finite_T = log_odds_T.isfinite()
        num_missing = int((~finite_T).sum())
        if num_missing:
            return self.not_finite_states(num_missing, len(branch.tags))
        return SolutionStates(states_TD, summaries_TD, log_odds_T, num_documents=group.num_documents)

    def _split_values(self, group: PackedQuestion, branch: Branch, values_LW: Tensor) -> tuple[Tensor, Tensor]:
        """States at the tags, and the mean middle state of each step's tokens, of [L, 2 D] from the first step on."""
        prefix, first, width = len(group.prefix_ids), _first_token(group, branch), self.hidden_size
        states_TD = values_LW[[prefix + tag - first for tag in branch.tags], :width]
        middle_LD = values_LW[:, width:].float()
        means = [middle_LD[start - first : end - first].mean(dim=0) for start, end in branch.spans(prefix)]
        summaries_TD = torch.stack(means)
        dtype = self.text_model.dtype
        return states_TD.to(self.device, dtype), summaries_TD.to(self.device, dtype)

    def shutdown(self) -> None:
        """Stop the engine."""
        if self.pooler is not None:
            self.pooler.shutdown()


def _first_token(group: PackedQuestion, branch: Branch) -> int:
    """The first token of a branch's first step, counted in the full sequence."""
    return branch.spans(len(group.prefix_ids))[0][0]


def _log_odds(values_TW: Tensor) -> Tensor:
    """Log-odds [T] of two classes' logits, or as the engine gives them."""
    if values_TW.shape[1] == 1:
        return values_TW[:, 0]
    return values_TW[:, 1] - values_TW[:, 0]


def _check_shard(vocabulary: int, pair_ids: Sequence[int], gpus: int) -> None:
    """Raise where the row of + or − in the head is not on the first GPU, which is where vLLM takes both from."""
    rows = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING // gpus
    if max(pair_ids) >= rows:
        raise CheckpointError(
            f"tensor_parallel_size={gpus} gives the first GPU {rows} rows of the head, and + and - are the tokens "
            f"{list(pair_ids)}; vLLM makes the classifier of that GPU's rows: take fewer GPUs an engine"
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
