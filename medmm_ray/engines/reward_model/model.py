"""`RewardModel`: a text tower that reads steps, and an image part that is added to its log-odds.

Enters: a question, its solutions, documents, images. Leaves: one `StepScores` a solution. The text tower is a causal
language model in Med-PRM's format (arXiv 2506.11474): the logits of " +" and " -" at each step's " ки". Only those
positions and those two rows of the head are computed, and the solutions of a question share one pass over what they
have in common, so that the scores are those of reading each solution alone, without its cost.

Needs torch and transformers; the image tower's library is loaded with the tower.

Legend: T tags, D text width, L packed length, P prefix length, B branches in a batch, S the longest of them, I images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, DynamicLayer

from medmm_ray.engines.reward_model import checkpoint
from medmm_ray.engines.reward_model.checkpoint import CheckpointError
from medmm_ray.engines.reward_model.fusion import Fusion, FusionConfig, ImageFeatures
from medmm_ray.engines.reward_model.packing import (
    MAX_LENGTH,
    RESERVE,
    Branch,
    Fit,
    PackedQuestion,
    attention_mask,
    pack,
    single_id,
)
from medmm_ray.text import TAG

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from medmm_ray.engines.image_tower import ImageTower

PLUS, MINUS = " +", " -"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageError(ValueError):
    """An image that the image tower cannot make numbers of."""


@dataclass(frozen=True)
class StepScores:
    """One solution's scores: probabilities that each step is right, and their log-odds = text part + image part.

    Rank by log-odds: a probability saturates and makes ties. `error` is None, or ``kind: message`` and no scores.
    """

    text_log_odds: list[float] = field(default_factory=list)
    image_log_odds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def log_odds(self) -> list[float]:
        return [t + i for t, i in zip(self.text_log_odds, self.image_log_odds, strict=True)]

    @property
    def plus_probs(self) -> list[float]:
        return cast(list[float], torch.tensor(self.log_odds, dtype=torch.float64).sigmoid().tolist())

    @property
    def min_plus_prob(self) -> float | None:
        return min(self.plus_probs, default=None)

    @property
    def final_plus_prob(self) -> float | None:
        return self.plus_probs[-1] if self.plus_probs else None


@dataclass(frozen=True)
class SolutionStates:
    """What the text tower says of one solution: ``states_TD`` at its tags after the final norm, ``summaries_TD`` (the
    mean state of each step's tokens in the middle layer) and the text's log-odds [T, fp32]; or an error."""

    states_TD: Tensor
    summaries_TD: Tensor
    log_odds_T: Tensor
    error: str | None = None


class RewardModel(nn.Module):
    """A process reward model; text-only without `image_tower` and `fusion`.

    `max_length`, `reserve` and `fit` bound the documents (`packing.choose_documents`).
    """

    def __init__(
        self,
        text_model: Any,
        tokenizer: Any,
        image_tower: "ImageTower | None" = None,
        fusion: Fusion | None = None,
        max_length: int = MAX_LENGTH,
        reserve: int = RESERVE,
        fit: Fit = "skip",
    ) -> None:
        super().__init__()
        if not tokenizer.chat_template:
            raise CheckpointError("the tokenizer has no chat template; a reward model's input is written with one")
        self.text_model, self.tokenizer = text_model, tokenizer
        self.image_tower, self.fusion = image_tower, fusion
        self.max_length, self.reserve, self.fit = max_length, reserve, fit
        try:
            self.tag_id, self.plus_id, self.minus_id = (single_id(tokenizer, t) for t in (TAG, PLUS, MINUS))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        rows = text_model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} entries but the model's vocabulary {rows}; "
                "they are not of one checkpoint"
            )

    # Making and keeping

    @classmethod
    def from_pretrained(
        cls, path: "str | Path", dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> "RewardModel":
        """Read a folder of `save_pretrained`, or a plain causal language model (folder or hub id) as text-only.

        Raises `CheckpointError` where `path` is neither.
        """
        saved = checkpoint.read(path)
        if saved is None:
            return cls.from_text_model(path, dtype, device)
        model = cls._read_text(path, dtype, saved.max_length, saved.reserve, saved.fit)
        ids = {"tag": model.tag_id, "plus": model.plus_id, "minus": model.minus_id}
        if ids != saved.ids:
            raise CheckpointError(f"{path}: its tokenizer gives the ids {ids}, its {checkpoint.CONFIG} has {saved.ids}")
        if saved.fusion is not None:
            from medmm_ray.engines.image_tower import ImageTower

            model.image_tower = ImageTower.from_pretrained(str(checkpoint.tower_folder(path)))
            model.fusion = Fusion(saved.fusion, model.hidden_size, model.image_tower.width)
            checkpoint.load_fusion(path, model.fusion)
        return model.to(device).eval()

    @classmethod
    def from_text_model(
        cls, path: "str | Path", dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> "RewardModel":
        """Wrap a causal language model; where its tokenizer has no single " ки" token, one is added, as Med-PRM does.

        The new token starts as the mean of all others, so that the same checkpoint gives the same model.
        """
        return cls._read_text(path, dtype).to(device).eval()

    @classmethod
    def _read_text(
        cls, path: "str | Path", dtype: str, max_length: int = MAX_LENGTH, reserve: int = RESERVE, fit: Fit = "skip"
    ) -> "RewardModel":
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        checkpoint.check_path(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            text_model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a causal language model that can be read: {error}") from error
        _add_tag(text_model, tokenizer)
        return cls(text_model, tokenizer, max_length=max_length, reserve=reserve, fit=fit)

    def add_image_tower(self, tower_path: "str | Path", fusion_config: FusionConfig | None = None) -> None:
        """Give a text-only model an image part; it changes no score until it is trained."""
        from medmm_ray.engines.image_tower import ImageTower

        self.image_tower = ImageTower.from_pretrained(str(tower_path)).to(self.device)
        self.fusion = Fusion(fusion_config or FusionConfig(), self.hidden_size, self.image_tower.width).to(self.device)

    def save_pretrained(self, folder: "str | Path", figures: Mapping[str, float] | None = None) -> None:
        """Write one folder: weights as safetensors, configs, tokenizer, ``image_tower/`` and a model card.

        `figures` are measured ones for the card. The folder opens in transformers (and vLLM) as the text tower.
        """
        checkpoint.write(self, folder, figures or {})

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.text_model.get_input_embeddings().weight.device)

    @property
    def hidden_size(self) -> int:
        return int(self.text_model.config.hidden_size)

    @property
    def context(self) -> int:
        """The longest sequence that the text tower can read, in tokens."""
        return int(self.text_model.config.max_position_embeddings)

    # Reading text

    def pack(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        training: bool = False,
    ) -> PackedQuestion:
        """`packing.pack` with this model's tokenizer and lengths."""
        return pack(
            self.tokenizer, question, solutions, documents,
            self.max_length, self.reserve, self.context, self.fit, training,
        )  # fmt: skip

    def forward(self, packed: PackedQuestion) -> Tensor:
        """Text log-odds of all tags [T, fp32], with gradient: what the text tower is trained on."""
        states_TD, _ = self.tag_states(packed)
        return self.head_log_odds(states_TD)

    def tag_states(self, packed: PackedQuestion) -> tuple[Tensor, Tensor]:
        """States after the final norm and step summaries at all tags (``states_TD``, ``summaries_TD``), with gradient.

        One packed row through the unchanged model under a block mask [L, L]: each branch is read as if alone.
        """
        if not packed.branches:
            raise ValueError("the packed question has no branch: none of its solutions could be packed")
        ids_1L, positions_1L = self._long([packed.ids]), self._long([packed.positions])
        mask_11LL = attention_mask(packed)[None, None].to(self.device)
        with self._middle() as middle:
            output = self.text_model.base_model(
                input_ids=ids_1L, attention_mask=mask_11LL, position_ids=positions_1L, use_cache=False
            )
        states_TD = output.last_hidden_state[0, packed.tag_positions]
        step_rows = packed.step_rows
        row_R = self._long([row for rows in step_rows for row in rows])
        tag_R = self._long([tag for tag, rows in enumerate(step_rows) for _ in rows])
        sums_TD = states_TD.new_zeros(states_TD.shape, dtype=torch.float32)
        sums_TD = sums_TD.index_add(0, tag_R, middle[0][0, row_R].float())
        counts_T = torch.tensor([len(rows) for rows in step_rows], device=self.device)
        return states_TD, (sums_TD / counts_T[:, None]).to(states_TD.dtype)

    def head_log_odds(self, states_TD: Tensor) -> Tensor:
        """logit(" +") − logit(" -") [T, fp32]: linear, so that of a sum of states it is the sum of theirs."""
        head_VD: Tensor = self.text_model.get_output_embeddings().weight
        return states_TD.float() @ (head_VD[self.plus_id].float() - head_VD[self.minus_id].float())

    @torch.inference_mode()
    def text_states(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        *,
        token_budget: int = 4096,
    ) -> list[SolutionStates]:
        """One entry a solution. The prefix is run once, then batches of at most `token_budget` tokens of branches.

        Equal solutions are read once.
        """
        keys = [s if isinstance(s, str) else tuple(s) for s in solutions]
        unique = list(dict.fromkeys(keys))
        packed = self.pack(question, unique, documents)
        found = {unique[i]: self._no_states(error) for i, error in enumerate(packed.errors) if error}
        if packed.branches:
            for branch, states in self._branch_states(packed, token_budget):
                found[unique[branch.solution]] = states
        return [found[key] for key in keys]

    def _branch_states(self, packed: PackedQuestion, token_budget: int) -> Iterator[tuple[Branch, SolutionStates]]:
        base, prefix = self.text_model.base_model, len(packed.prefix_ids)
        cache = DynamicCache(config=self.text_model.config)
        with self._middle() as middle:
            base(input_ids=self._long([packed.prefix_ids]), past_key_values=cache, use_cache=True)
        prefix_middle_PD = middle[0][0]
        for batch in _batches(packed.branches, token_budget):
            longest = max(len(b.ids) for b in batch)
            # Padding stands on the right, where a causal mask already hides it.
            ids_BS = self._long([b.ids + [0] * (longest - len(b.ids)) for b in batch])
            mask_SK = torch.ones(longest, prefix + longest, dtype=torch.bool, device=self.device).tril(prefix)
            with self._middle() as middle:
                output = base(
                    input_ids=ids_BS,
                    attention_mask=mask_SK[None, None],
                    position_ids=torch.arange(prefix, prefix + longest, device=self.device)[None],
                    past_key_values=_shared(cache, len(batch)),
                    use_cache=True,
                )
            for row, branch in enumerate(batch):
                states_TD = output.last_hidden_state[row, branch.tags]
                summaries_TD = _summaries(branch, prefix_middle_PD, middle[0][row]).to(states_TD.dtype)
                yield branch, SolutionStates(states_TD, summaries_TD, self.head_log_odds(states_TD))

    def _no_states(self, error: str) -> SolutionStates:
        empty_0D = torch.zeros(0, self.hidden_size, dtype=self.text_model.dtype, device=self.device)
        return SolutionStates(empty_0D, empty_0D, torch.zeros(0, device=self.device), error)

    @contextmanager
    def _middle(self) -> Iterator[list[Tensor]]:
        """Catch what enters the middle layer, without keeping every layer's states."""
        layers = self.text_model.base_model.layers
        caught: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[:] = [args[0]]

        handle = layers[len(layers) // 2].register_forward_pre_hook(keep)
        try:
            yield caught
        finally:
            handle.remove()

    def _long(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    # Reading images

    def image_features(self, images: Sequence["Image"], references: Sequence["Image"] = ()) -> ImageFeatures:
        """One question's images and its reference images as the fusion reads them.

        Raises `ImageError` where an image gives no finite numbers.
        """
        tower, fusion = self._two_towers()
        pixels_I3HW = torch.stack([tower.preprocess(i) for i in (*images, *references)]).to(self.device)
        if not bool(pixels_I3HW.isfinite().all()):
            raise ImageError("image_not_finite: an image has pixels that are no finite numbers")
        tokens = tower(pixels_I3HW)
        own, more = range(len(images)), range(len(images), len(images) + len(references))
        return ImageFeatures.gather(
            tokens.pooled_BD, tokens.patches_BPD if fusion.reads_patches else None, [own], [more]
        )

    @torch.inference_mode()
    def image_log_odds(self, states: Sequence[SolutionStates], features: ImageFeatures) -> list[list[float]]:
        """What one question's images add to the log-odds of each solution's steps."""
        _, fusion = self._two_towers()
        delta_TD = fusion(
            torch.cat([s.states_TD for s in states]), torch.cat([s.summaries_TD for s in states]), features
        )
        parts = torch.split(self.head_log_odds(delta_TD), [len(s.states_TD) for s in states])
        return [part.tolist() for part in parts]

    def _two_towers(self) -> "tuple[ImageTower, Fusion]":
        if self.image_tower is None or self.fusion is None:
            raise ValueError("this reward model is text-only: it has no image tower; score without image")
        return self.image_tower, self.fusion

    # Scoring

    @torch.inference_mode()
    def score(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        image: "Image | Sequence[Image] | None" = None,
        reference_images: Sequence["Image"] = (),
        *,
        token_budget: int = 4096,
    ) -> list[StepScores]:
        """Scores of each solution, in order; none depends on the others, their order or the budget.

        Args:
            question: with its options in the text (`text.question_with_options`).
            solutions: each raw text with "Step i:" marks, or a list of steps.
            documents: in rank order; those that fit are read.
            image: the question's picture, or several; without one the image part is exactly 0.
            reference_images: similar cases; looked at only together with an image.
            token_budget: the most tokens of solutions in one batch; it bounds memory and changes no score.
        """
        images = [] if image is None else list(image) if isinstance(image, Sequence) else [image]
        states = self.text_states(question, solutions, documents, token_budget=token_budget)
        try:
            features = self.image_features(images, reference_images) if images else None
        except ImageError as error:
            return [StepScores(error=str(error)) for _ in states]
        return self.step_scores(states, features)

    def step_scores(self, states: Sequence[SolutionStates], features: ImageFeatures | None) -> list[StepScores]:
        """The scores of solutions that were read, with one question's images or without."""
        text = [s.log_odds_T.tolist() for s in states]
        image = self.image_log_odds(states, features) if features and states else [[0.0] * len(t) for t in text]
        return [
            StepScores(error=s.error) if s.error else StepScores(t, i)
            for s, t, i in zip(states, text, image, strict=True)
        ]


def _add_tag(text_model: Any, tokenizer: Any) -> None:
    """Make `TAG` one token, its embedding (and head row) the mean of the others."""
    if len(tokenizer(TAG, add_special_tokens=False)["input_ids"]) == 1:
        return
    tokenizer.add_tokens([AddedToken(TAG, special=True, normalized=False)], special_tokens=True)
    rows = text_model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for part in (text_model.get_input_embeddings(), text_model.get_output_embeddings()):
            part.weight[rows:] = part.weight[:rows].float().mean(dim=0).to(part.weight.dtype)


def _batches(branches: Sequence[Branch], token_budget: int) -> Iterator[list[Branch]]:
    """Branches of similar length together, at most `token_budget` tokens with padding (one branch at least)."""
    batch: list[Branch] = []
    for branch in sorted(branches, key=lambda b: -len(b.ids)):  # the first is the longest
        if batch and (len(batch) + 1) * len(batch[0].ids) > token_budget:
            yield batch
            batch = []
        batch.append(branch)
    yield batch


def _shared(cache: DynamicCache, size: int) -> Cache:
    """The prefix's keys and values seen by `size` rows, without a copy; what is added later leaves `cache` as it is."""
    layers: list[Any] = []
    for held in cast(list[Any], cache.layers):
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.lazy_initialization(held.keys, held.values)
        layer.keys = held.keys.expand(size, -1, -1, -1)
        layer.values = held.values.expand(size, -1, -1, -1)
        layers.append(layer)
    return Cache(layers=layers)


def _summaries(branch: Branch, prefix_PD: Tensor, branch_SD: Tensor) -> Tensor:
    """Each step's mean state [T, D, fp32]; the first step may start inside the shared prefix."""
    prefix = len(prefix_PD)
    means = []
    for start, end in branch.spans(prefix):
        ahead_D = prefix_PD[start:prefix].float().sum(dim=0)
        own_D = branch_SD[max(start - prefix, 0) : end - prefix].float().sum(dim=0)
        means.append((ahead_D + own_D) / (end - start))
    return torch.stack(means)
