"""`RewardModel`: a text tower that reads steps, and an image part that is added to its log-odds.

Enters: a question, its solutions, documents, images. Leaves: one `StepScores` a solution. The text tower is a language
model in one of the published formats (`families`), by default Med-PRM's (arXiv 2506.11474): the logits of " +" and " -"
at each step's " ки". The head runs at those places alone, and the solutions of a question share one pass over what they
have in common, so that the scores are those of reading each solution alone, without its cost.

Needs torch and transformers; the image tower's library is loaded with the tower.

Legend: T tags, D text width, I images.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from medmm_ray.engines.dtype_device import DTYPE_NAMES, device_of, dtype_of
from medmm_ray.engines.model_source import ModelSource
from medmm_ray.engines.onednn_linear import use_onednn
from medmm_ray.reward_model import checkpoint, families, text_tower
from medmm_ray.reward_model.errors import CheckpointError, ImageError
from medmm_ray.reward_model.families import FamilyName
from medmm_ray.reward_model.forward import RowPiece, forward_row, pack_rows
from medmm_ray.reward_model.fusion import Fusion, FusionConfig, ImageFeatures
from medmm_ray.reward_model.image_inputs import rgb_of
from medmm_ray.reward_model.packing import (
    MAX_LENGTH,
    RESERVE,
    Fit,
    ImageEmbeddings,
    PackedQuestion,
    Packing,
    pack,
)
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.vision_language import Vision

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from medmm_ray.engines.image_tower import ImageTower

CPU_BUDGET = (
    1024  # tokens of a row: the attention kernel is at its fastest from 768 queries on, and more only take memory
)
GPU_BUDGET = 4096


@dataclass(frozen=True)
class StepScores:
    """One solution's scores: probabilities that each step is right, and their log-odds = text part + image part.

    Rank by log-odds: a probability saturates and makes ties. `error` is None, or ``kind: message`` and no scores.
    `num_documents` were read with it: fewer than with its neighbours where it is too long for all of them.
    """

    text_log_odds: list[float] = field(default_factory=list)
    image_log_odds: list[float] = field(default_factory=list)
    error: str | None = None
    num_documents: int = 0

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
    num_documents: int = 0


class RewardModel(nn.Module):
    """A process reward model; text-only without `image_tower` and `fusion`.

    With `vision`, the text model is a vision-language model that reads the images itself; it takes no image tower.
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
        family: FamilyName = "medprm",
        vision: Vision | None = None,
    ) -> None:
        super().__init__()
        self.text_model, self.tokenizer, self.vision = text_model, tokenizer, vision
        self.image_tower, self.fusion = image_tower, fusion
        self.max_length, self.reserve, self.fit = max_length, reserve, fit
        if vision is not None:  # the same documents, whether the image is shown or not
            self.max_length = min(max_length, self.context - vision.max_image_tokens)
        try:
            self.family = families.make(family, tokenizer, vision.image_tokens if vision else None)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        text_tower.check_vocabulary(text_model, tokenizer)
        self._system_prompt: str | None = None
        use_onednn(self)
        self.text_origin = ModelSource(text_model.config.name_or_path or "made in memory", None)
        self.figures: dict[str, float] = {}

    # Making and keeping

    @classmethod
    def from_pretrained(
        cls,
        path: "str | Path",
        dtype: str | torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        family: FamilyName | None = None,
        revision: str | None = None,
        gguf_file: str | None = None,
        base: "str | Path | None" = None,
        merge: "Sequence[str | Path]" = (),
        *,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | None = None,
    ) -> "RewardModel":
        """Read what `save_pretrained` or `push_to_hub` wrote, or a published checkpoint, which has no image tower.

        `path` is a folder or a hub id, `revision` a branch, tag or commit there; `gguf_file` names a GGUF file in it,
        which is read dequantised in `dtype` (how far its scores drift: `python -m jobs.bench gguf`).

        `dtype` is the text tower's number format: "float32" (the default), "bfloat16", "float16", torch's own of these,
        or "auto" for the checkpoint's own; the image part is in float32. `device` is "cpu" (the default), "cuda",
        "cuda:N", or "auto": the GPU, where there is one. `torch_dtype` and `device_map` are other names of the two; a
        map over several devices is refused.

        `family` is detected from the checkpoint where it is not given (`families.detect`). A causal language model with
        a chat template is read as Med-PRM's: where its tokenizer has no single " ки", one is added as Med-PRM does, its
        row the mean of all others, so that the same checkpoint gives the same model.

        A vision-language model reads images itself: LLaVA in Med-PRM's format, InternVL in VisualPRM's or, with
        ``family="medprm_vision"``, in Med-PRM's.

        A checkpoint that is a peft adapter is merged into `base` (default: the one that it names), after the adapters
        `merge`, in order; MedS3's reward model stands on its policy: ``merge=["…/MedSSS_Policy"]``. One that classifies
        tokens is read as MedS3's; ``family="token_classification"`` reads it as TRL's.

        Raises `CheckpointError` where `path` is none of these, where a file is not whole, and where the files do not
        hold exactly the model's weights; `ValueError` for a dtype or a device that is not there.
        """
        number_format, place = dtype_of(dtype, torch_dtype), device_of(device, device_map)
        path = checkpoint.locate(path, revision)
        saved = checkpoint.read(path)
        text = text_tower.load_text_tower(
            path, number_format, family or (saved.family if saved else None), revision, gguf_file, base, merge
        )
        if text.model.dtype not in (getattr(torch, name) for name in DTYPE_NAMES):  # "auto" takes what is there
            raise CheckpointError(f"{path} is in {text.model.dtype}; name the format to read it in: dtype='bfloat16'")
        model = cls(text.model, text.tokenizer, family=text.family, vision=text.vision)
        model.text_origin = text.origin
        if saved is not None:
            model._restore(path, saved)
        return model.to(place).eval()

    def _restore(self, path: "str | Path", saved: checkpoint.SavedConfig) -> None:
        """What a folder of `save_pretrained` has besides the text tower."""
        if dict(self.family.ids) != saved.ids:
            raise CheckpointError(
                f"{path}: its tokenizer gives the ids {dict(self.family.ids)}, its {checkpoint.CONFIG} has {saved.ids}"
            )
        self.max_length, self.reserve, self.fit = saved.max_length, saved.reserve, saved.fit
        self.system_prompt = saved.system_prompt
        if self.family.template is not None and saved.template is not None:
            checkpoint.restore_template(path, self.family.template, saved.template)
        self.text_origin, self.figures = saved.text_origin, saved.figures
        if saved.fusion is not None:
            from medmm_ray.engines.image_tower import ImageTower

            try:
                self.image_tower = ImageTower.from_pretrained(checkpoint.tower_folder(path))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: {error}") from error
            if saved.image_origin is not None:
                self.image_tower.origin = saved.image_origin
            self.fusion = Fusion(saved.fusion, self.hidden_size, self.image_tower.width)
            checkpoint.load_fusion(path, self.fusion)

    def add_image_tower(
        self, tower_path: "str | Path", fusion_config: FusionConfig | None = None, revision: str | None = None
    ) -> None:
        """Give a text-only model an image part (`ImageTower.from_pretrained`); it changes no score until trained."""
        if self.vision is not None:
            raise CheckpointError(
                f"a reward model of the family {self.family.name} takes no image tower: its language model reads the "
                "images itself"
            )
        if not self.family.additive:
            raise CheckpointError(
                f"a reward model of the family {self.family.name} takes no image part: its log-odds are not linear in "
                "the state; start from one of the family medprm"
            )
        from medmm_ray.engines.image_tower import ImageTower

        self.image_tower = ImageTower.from_pretrained(tower_path, revision).to(self.device)
        self.fusion = Fusion(fusion_config or FusionConfig(), self.hidden_size, self.image_tower.width).to(self.device)

    def save_pretrained(self, folder: "str | Path", figures: Mapping[str, float] | None = None) -> None:
        """Write one folder: weights as safetensors, configs, tokenizer, ``image_tower/`` and a model card.

        `figures` are measured ones for the card. The folder opens in transformers as the text tower.
        """
        checkpoint.write(self, folder, figures or {})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Process reward model",
        figures: Mapping[str, float] | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the model repository `repo_id` (org/name); gives the commit's URL.

        The repository is made where it does not exist (`private`: None is the owner's default), and so is the branch
        `revision`. `token` defaults to the one of ``hf auth login``. `figures` for the card: by default those that the
        model was saved with. Raises huggingface_hub's `HfHubHTTPError` where the hub refuses.
        """
        figures = self.figures if figures is None else figures
        return checkpoint.push(self, repo_id, figures, private, token, revision, commit_message)

    @property
    def system_prompt(self) -> str | None:
        """The instruction in the place of the family's own (None), for checkpoints that are asked with another, like
        the one on Med-PRM's model card. `save_pretrained` keeps it.

        Setting one raises `CheckpointError` for a family whose format has no system prompt, or a fixed one.
        """
        return self._system_prompt

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        if text is not None and self.family.name not in families.WITH_SYSTEM_PROMPT:
            raise CheckpointError(
                f"a reward model of the family {self.family.name} takes no other system prompt; those that do: "
                f"{', '.join(families.WITH_SYSTEM_PROMPT)}"
            )
        self._system_prompt = text

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.text_model.get_input_embeddings().weight.device)

    @property
    def hidden_size(self) -> int:
        return int(self.text_model.config.get_text_config().hidden_size)

    @property
    def reads_images(self) -> bool:
        """Whether it has an image part, or a language model that reads images itself."""
        return self.image_tower is not None or self.vision is not None

    @property
    def context(self) -> int:
        """The longest sequence that the text tower can read, in tokens: within it a sliding window hides nothing."""
        config = self.text_model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return int(min(config.max_position_embeddings, window or config.max_position_embeddings))

    # ScoringJob text

    def pack(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        training: bool = False,
        image_embeddings: ImageEmbeddings | None = None,
    ) -> Packing:
        """`packing.pack` with this model's tokenizer and lengths."""
        return pack(
            self.family, question, solutions, documents,
            self.max_length, self.reserve, self.context, self.fit, training, image_embeddings, self.system_prompt,
        )  # fmt: skip

    def forward(self, *packed: PackedQuestion) -> Tensor:
        """Text log-odds of all tags [T, fp32], in order, with gradient: what the text tower is trained on."""
        states_TD, _ = self.tag_states(*packed)
        return self.head_log_odds(states_TD)

    def tag_states(self, *packed: PackedQuestion) -> tuple[Tensor, Tensor]:
        """States after the final norm and step summaries at all tags (``states_TD``, ``summaries_TD``), with gradient.

        One packed row: each branch of each question is read as if alone.
        """
        return forward_row(self.text_model, [RowPiece.whole(None, p, p.branches) for p in packed], self.device)

    def head_log_odds(self, states_TD: Tensor) -> Tensor:
        """Log-odds of right against wrong [T, fp32]; where the family is additive, of a sum of states their sum."""
        return self.family.log_odds(self.text_model, states_TD)

    def text_states(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        *,
        token_budget: int | None = None,
    ) -> list[SolutionStates]:
        """What the text tower says of one question's solutions, one entry each."""
        return next(self.iter_states([ScoreRequest(question, solutions, documents)], token_budget=token_budget))

    @torch.inference_mode()
    def iter_states(
        self, requests: Iterable[ScoreRequest], *, token_budget: int | None = None, together: bool = True
    ) -> Iterator[list[SolutionStates]]:
        """`text_states` of many questions, in order, in rows of at most `token_budget` tokens.

        Equal solutions of a question are read once. With `together`, questions share rows: faster where they are short,
        but then the last bits of a state depend on its neighbours. A vision-language model reads the images here.
        """
        waiting: deque[ScoringJob] = deque()

        def packed() -> Iterator[tuple[ScoringJob, PackedQuestion]]:
            for request in requests:
                reading = ScoringJob(self, request)
                waiting.append(reading)
                for group in reading.packing.groups:
                    yield reading, group

        budget = token_budget or (CPU_BUDGET if self.device.type == "cpu" else GPU_BUDGET)
        alone = (row for question in packed() for row in pack_rows([question], budget))
        for row in pack_rows(packed(), budget) if together else alone:
            states_TD, summaries_TD = forward_row(self.text_model, row, self.device)
            log_odds_T = self.head_log_odds(states_TD)
            finite_T = log_odds_T.isfinite() & states_TD.isfinite().all(dim=1) & summaries_TD.isfinite().all(dim=1)
            is_finite = finite_T.tolist()
            at = 0
            for piece in row:
                for branch in piece.branches:
                    own = slice(at, at + len(branch.tags))
                    at = own.stop
                    found = SolutionStates(
                        states_TD[own], summaries_TD[own], log_odds_T[own], num_documents=piece.packed.num_documents
                    )
                    missing = is_finite[own].count(False)
                    piece.job.found[branch.solution] = (
                        self.not_finite_states(missing, len(branch.tags)) if missing else found
                    )
            while waiting and waiting[0].complete:
                yield waiting.popleft().states()
        while waiting:
            yield waiting.popleft().states()

    def error_states(self, error: str) -> SolutionStates:
        """What stands for a solution that could not be read."""
        empty_0D = torch.zeros(0, self.hidden_size, dtype=self.text_model.dtype, device=self.device)
        return SolutionStates(empty_0D, empty_0D, torch.zeros(0, device=self.device), error)

    def not_finite_states(self, missing: int, num_steps: int) -> SolutionStates:
        """What stands for a solution that the text tower makes no numbers of. Its neighbours in a row keep theirs:
        branches never see each other."""
        advice = (
            "float16 holds nothing above 65,504: load the model with dtype=bfloat16 or float32"
            if self.text_model.dtype == torch.float16
            else "look for NaN among the checkpoint's weights, or load the model with dtype=float32"
        )
        name = str(self.text_model.dtype).removeprefix("torch.")
        return self.error_states(f"not_finite: {missing} of {num_steps} steps have no finite score in {name}; {advice}")

    # ScoringJob images

    def image_features(self, images: Sequence["Image"], references: Sequence["Image"] = ()) -> ImageFeatures:
        """One question's images and its reference images as the fusion reads them.

        Raises `ImageError` where an image cannot be decoded or gives no finite numbers.
        """
        tower, fusion = self._two_towers()
        pixels_I3HW = torch.stack([tower.preprocess(rgb_of(i)) for i in (*images, *references)]).to(self.device)
        if not bool(pixels_I3HW.isfinite().all()):
            raise ImageError("image_not_finite: an image has pixels that are no finite numbers")
        tokens = tower(pixels_I3HW)
        read = [tokens.pooled_BD, *([tokens.patches_BPD] if fusion.reads_patches else [])]
        if not all(bool(part.isfinite().all()) for part in read):
            raise ImageError(
                "image_not_finite: the image tower makes no finite numbers of an image; look at its weights"
            )
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

    def score(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        image: "Image | Sequence[Image] | None" = None,
        reference_images: Sequence["Image"] = (),
        *,
        token_budget: int | None = None,
    ) -> list[StepScores]:
        """Scores of each solution, in order; none depends on the others, their order or the budget. One whose scores
        are not finite (float16 overflows) has an error in their place, ``not_finite: …``.

        Args:
            question: with its options in the text (`text.question_with_options`).
            solutions: each raw text with "Step i:" marks, with or without tags, or a list of steps.
            documents: in rank order; those that fit are read.
            image: the question's picture, or several; without one the image part is exactly 0. A vision-language
                model reads it with the text, so that its whole answer is the text part.
            reference_images: similar cases; looked at only together with an image, and refused (`ValueError`) by a
                vision-language model, whose formats have no place for them.
            token_budget: the most tokens that are read at once; it bounds memory and changes no score. None: 1,024 on a
                CPU, 4,096 on a GPU.
        """
        request = ScoreRequest(question, solutions, documents, image, reference_images)
        return next(self.score_many([request], token_budget=token_budget))

    @torch.inference_mode()
    def score_many(
        self, requests: Iterable[ScoreRequest], *, token_budget: int | None = None
    ) -> Iterator[list[StepScores]]:
        """`score` of a stream of questions, in order, read together so that every pass is as large as the budget."""
        asked: deque[ScoreRequest] = deque()

        def noted() -> Iterator[ScoreRequest]:
            for request in requests:
                asked.append(request)
                yield request

        for states in self.iter_states(noted(), token_budget=token_budget):
            request = asked.popleft()
            images = [] if self.vision else request.images  # else they are in the states
            try:
                features = self.image_features(images, request.reference_images) if images else None
            except ImageError as error:
                yield [StepScores(error=str(error)) for _ in states]
            else:
                yield self.step_scores(states, features)

    def step_scores(self, states: Sequence[SolutionStates], features: ImageFeatures | None) -> list[StepScores]:
        """The scores of solutions that were read, with one question's images or without; an error, not a score, where
        the image part of one is not finite."""
        text = [s.log_odds_T.tolist() for s in states]
        image = self.image_log_odds(states, features) if features and states else [[0.0] * len(t) for t in text]
        return [_scores(s.error, t, i, s.num_documents) for s, t, i in zip(states, text, image, strict=True)]


def _scores(
    error: str | None, text_log_odds: list[float], image_log_odds: list[float], num_documents: int
) -> StepScores:
    missing = sum(not math.isfinite(x) for x in image_log_odds)
    if missing and error is None:
        error = (
            f"not_finite: the image part of {missing} of {len(image_log_odds)} steps is not finite; look for NaN among "
            "the fusion's weights"
        )
    return StepScores(error=error) if error else StepScores(text_log_odds, image_log_odds, num_documents=num_documents)


class ScoringJob:
    """A request while it is read: what is found of each of its different solutions."""

    def __init__(self, model: RewardModel, request: ScoreRequest) -> None:
        self.model = model
        self.keys = [s if isinstance(s, str) else tuple(s) for s in request.solutions]
        self.unique = list(dict.fromkeys(self.keys))
        try:
            seen = self._seen(request.images, request.reference_images) if model.vision else None
        except ImageError as error:
            self.packing = Packing([], [str(error)] * len(self.unique))
        else:
            self.packing = model.pack(request.question, self.unique, request.documents, image_embeddings=seen)
        self.found = {i: model.error_states(error) for i, error in enumerate(self.packing.errors) if error}

    def _seen(self, images: Sequence["Image"], references: Sequence["Image"]) -> ImageEmbeddings | None:
        if references:
            raise ValueError(
                f"{len(references)} reference images: a reward model of the family {self.model.family.name} knows a "
                "question's own images alone; leave reference_images empty"
            )
        assert self.model.vision is not None
        return self.model.vision.embed(self.model.text_model, images) if images else None

    @property
    def complete(self) -> bool:
        return len(self.found) == len(self.unique)

    def states(self) -> list[SolutionStates]:
        by_key = {key: self.found[i] for i, key in enumerate(self.unique)}
        return [by_key[key] for key in self.keys]
