"""`RewardModel`: a text tower that scores steps, and an image part that is added to its log-odds.

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
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from medmm_ray.engines.dtype_device import DTYPE_NAMES, device_of, dtype_of
from medmm_ray.engines.model_source import ModelSource
from medmm_ray.engines.onednn_linear import use_onednn
from medmm_ray.reward_model import checkpoint, families, text_tower
from medmm_ray.reward_model.errors import CheckpointError, ImageError
from medmm_ray.reward_model.families import FamilyName
from medmm_ray.reward_model.forward import RowPacker, RowPiece, forward_row
from medmm_ray.reward_model.full_sequence import Solution
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
from medmm_ray.reward_model.scores import SolutionStates, StepAttention, StepScores
from medmm_ray.reward_model.scoring_job import ScoringJob
from medmm_ray.reward_model.vision_language import Vision

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from medmm_ray.engines.image_tower import ImageTower

# Tokens of a row. On a CPU the attention kernel is at its fastest from 768 queries on, and more only take memory.
CPU_BUDGET = 1024
GPU_BUDGET = 4096


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
        image_tokens = None
        if vision is not None:
            image_tokens = vision.image_tokens
            # The same documents, whether the image is given or not.
            self.max_length = min(max_length, self.context - vision.max_image_tokens)
        try:
            self.family = families.make(family, tokenizer, image_tokens)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        text_tower.check_vocabulary(text_model, tokenizer)  # else an id without a row fails deep in the model
        self._system_prompt: str | None = None
        use_onednn(self)
        self.text_origin = ModelSource(text_model.config.name_or_path or "made in memory", None)
        self.figures: dict[str, float] = {}
        self.trained_inputs = checkpoint.TrainedInputs()

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
        which is read dequantised in `dtype` (how far its scores move: `python -m jobs.bench gguf`).

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
        number_format, target_device = dtype_of(dtype, torch_dtype), device_of(device, device_map)
        path = checkpoint.locate(path, revision)
        saved = checkpoint.read(path)
        if family is None and saved is not None:
            family = saved.family
        text = text_tower.load_text_tower(path, number_format, family, revision, gguf_file, base, merge)
        served_dtypes = [getattr(torch, name) for name in DTYPE_NAMES]
        if text.model.dtype not in served_dtypes:  # "auto" takes what is there
            raise CheckpointError(f"{path} is in {text.model.dtype}; name the format to read it in: dtype='bfloat16'")
        model = cls(text.model, text.tokenizer, family=text.family, vision=text.vision)
        model.text_origin = text.origin
        if saved is not None:
            model.restore(path, saved)
        return model.to(target_device).eval()

    def restore(self, path: "str | Path", saved: checkpoint.SavedConfig) -> None:
        """Take over what a folder of `save_pretrained` has besides the text tower's weights."""
        if dict(self.family.ids) != saved.ids:
            raise CheckpointError(
                f"{path}: its tokenizer gives the ids {dict(self.family.ids)}, its {checkpoint.CONFIG} has {saved.ids}"
            )
        self.max_length, self.reserve, self.fit = saved.max_length, saved.reserve, saved.fit
        self.system_prompt = saved.system_prompt
        if self.family.template is not None and saved.template is not None:
            checkpoint.restore_template(path, self.family.template, saved.template)
        self.text_origin, self.figures = saved.text_origin, saved.figures
        self.trained_inputs = saved.trained_inputs
        if saved.fusion is not None:
            self._restore_image_part(path, saved, saved.fusion)

    def _restore_image_part(self, path: "str | Path", saved: checkpoint.SavedConfig, config: FusionConfig) -> None:
        from medmm_ray.engines.image_tower import ImageTower

        try:
            self.image_tower = ImageTower.from_pretrained(checkpoint.tower_folder(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        if saved.image_origin is not None:
            self.image_tower.origin = saved.image_origin
        self.fusion = Fusion(config, self.hidden_size, self.image_tower.width)
        checkpoint.load_fusion(path, self.fusion)

    def add_image_tower(
        self, tower_path: "str | Path", fusion_config: FusionConfig | None = None, revision: str | None = None
    ) -> None:
        """Give a text-only model an image part (`ImageTower.from_pretrained`); it changes no score until trained."""
        self.check_image_part()
        from medmm_ray.engines.image_tower import ImageTower

        self.image_tower = ImageTower.from_pretrained(tower_path, revision).to(self.device)
        self.fusion = Fusion(fusion_config or FusionConfig(), self.hidden_size, self.image_tower.width).to(self.device)

    def check_image_part(self) -> None:
        """Raise `CheckpointError` where the model takes no image part."""
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
        """Where the text tower works."""
        return cast(torch.device, self.text_model.get_input_embeddings().weight.device)

    @property
    def default_budget(self) -> int:
        """Tokens of a row where no budget is set."""
        return CPU_BUDGET if self.device.type == "cpu" else GPU_BUDGET

    @property
    def hidden_size(self) -> int:
        """The text tower's width, which is that of a state."""
        return int(self.text_model.config.get_text_config().hidden_size)

    @property
    def reads_images(self) -> bool:
        """Whether it has an image part, or a language model that reads images itself."""
        return self.image_tower is not None or self.vision is not None

    @property
    def context(self) -> int:
        """The longest sequence that the text tower can read, in tokens: within it a sliding window hides nothing."""
        config = self.text_model.config.get_text_config()
        longest = config.max_position_embeddings
        # Qwen2's configs have a window also where it is not used, and say so apart.
        uses_window = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None) if uses_window else None
        return int(min(longest, window or longest))

    # The text tower

    def pack(
        self,
        question: str,
        solutions: Sequence[Solution],
        documents: Sequence[str] = (),
        training: bool = False,
        image_embeddings: ImageEmbeddings | None = None,
    ) -> Packing:
        """`packing.pack` with this model's tokenizer and lengths."""
        return pack(
            self.family,
            question,
            solutions,
            documents,
            max_length=self.max_length,
            reserve=self.reserve,
            context=self.context,
            fit=self.fit,
            training=training,
            image_embeddings=image_embeddings,
            system=self.system_prompt,
        )

    def scoring_job(self, request: ScoreRequest) -> ScoringJob:
        """A request whose solutions are packed, to be read."""
        return ScoringJob(request, self._pack_request, self.error_states)

    def _pack_request(self, request: ScoreRequest, solutions: Sequence[Solution]) -> Packing:
        try:
            image_embeddings = self._embed(request.images, request.reference_images) if self.vision else None
        except ImageError as error:
            # Without its images none of the solutions can be read; the other requests of the stream go on.
            return Packing([], [str(error)] * len(solutions))
        return self.pack(request.question, solutions, request.documents, image_embeddings=image_embeddings)

    def _embed(self, images: Sequence["Image"], references: Sequence["Image"]) -> ImageEmbeddings | None:
        """The images as a language model that reads them itself takes them."""
        if references:
            raise ValueError(
                f"{len(references)} reference images: a reward model of the family {self.family.name} knows a "
                "question's own images alone; leave reference_images empty"
            )
        assert self.vision is not None
        return self.vision.embed(self.text_model, images) if images else None

    def forward(self, *packed: PackedQuestion) -> Tensor:
        """Text log-odds of all tags [T, fp32], in order, with gradient: what the text tower is trained on."""
        states_TD, _ = self.tag_states(*packed)
        return self.head_log_odds(states_TD)

    def tag_states(self, *packed: PackedQuestion) -> tuple[Tensor, Tensor]:
        """States after the final norm and step summaries at all tags (``states_TD``, ``summaries_TD``), with gradient.

        One packed row: each branch of each question is read as if alone.
        """
        row = [RowPiece.whole(None, question, question.branches) for question in packed]
        return forward_row(self.text_model, row, self.device)

    def head_log_odds(self, states_TD: Tensor) -> Tensor:
        """Log-odds of right against wrong [T, fp32]; where the family is additive, of a sum of states their sum."""
        return self.family.log_odds(self.text_model, states_TD)

    def text_states(
        self,
        question: str,
        solutions: Sequence[Solution],
        documents: Sequence[str] = (),
        *,
        token_budget: int | None = None,
    ) -> list[SolutionStates]:
        """What the text tower says of one question's solutions, one entry each."""
        request = ScoreRequest(question, solutions, documents)
        _, states = next(self.iter_states([request], token_budget=token_budget))
        return states

    @torch.inference_mode()
    def iter_states(
        self, requests: Iterable[ScoreRequest], *, token_budget: int | None = None, together: bool = True
    ) -> Iterator[tuple[ScoreRequest, list[SolutionStates]]]:
        """Each request with its solutions' states, in order, computed in rows of at most `token_budget` tokens.

        Equal solutions of a question are read once. With `together`, questions share rows: faster where they are short,
        but then the last bits of a state depend on its neighbours. A vision-language model reads the images here.
        """
        packer = RowPacker(token_budget or self.default_budget)
        jobs: deque[ScoringJob] = deque()  # not yet given out, in the requests' order
        for request in requests:
            job = self.scoring_job(request)
            jobs.append(job)
            for group in job.packing.groups:
                rows = packer.add(job, group)
                if not together:
                    rows += packer.flush()
                for row in rows:
                    self.forward_pieces(row)
            while jobs and jobs[0].is_complete:
                job = jobs.popleft()
                yield job.request, job.states()
        for row in packer.flush():
            self.forward_pieces(row)
        for job in jobs:
            yield job.request, job.states()

    @torch.inference_mode()
    def forward_pieces(self, row: Sequence[RowPiece]) -> None:
        """One forward pass over a row, whose pieces' jobs get what comes of their branches."""
        states_TD, summaries_TD = forward_row(self.text_model, row, self.device)
        log_odds_T = self.head_log_odds(states_TD)
        # Asked of a whole row at once: each question to a GPU costs a wait.
        finite_T = log_odds_T.isfinite() & states_TD.isfinite().all(dim=1) & summaries_TD.isfinite().all(dim=1)
        is_finite = finite_T.tolist()
        start = 0
        for piece in row:
            for branch in piece.branches:
                tags = slice(start, start + len(branch.tags))
                start = tags.stop
                num_missing = is_finite[tags].count(False)
                if num_missing:
                    states = self.not_finite_states(num_missing, len(branch.tags))
                else:
                    states = SolutionStates(
                        states_TD[tags],
                        summaries_TD[tags],
                        log_odds_T[tags],
                        num_documents=piece.packed.num_documents,
                    )
                piece.job.add(branch, states)

    def error_states(self, error: str) -> SolutionStates:
        """What stands for a solution that cannot be read: no states, and why."""
        empty_0D = torch.zeros(0, self.hidden_size, dtype=self.text_model.dtype, device=self.device)
        return SolutionStates(empty_0D, empty_0D, torch.zeros(0, device=self.device), error)

    def not_finite_states(self, num_missing: int, num_steps: int) -> SolutionStates:
        """What stands for a solution that the text tower makes no numbers of. Its neighbours in a row keep theirs:
        branches never see each other."""
        if self.text_model.dtype == torch.float16:
            advice = "float16 holds nothing above 65,504: load the model with dtype=bfloat16 or float32"
        else:
            advice = "look for NaN among the checkpoint's weights, or load the model with dtype=float32"
        name = str(self.text_model.dtype).removeprefix("torch.")
        return self.error_states(
            f"not_finite: {num_missing} of {num_steps} steps have no finite score in {name}; {advice}"
        )

    # The image part

    def image_features(self, images: Sequence["Image"], references: Sequence["Image"] = ()) -> ImageFeatures:
        """One question's images and its reference images as the fusion reads them.

        Raises `ImageError` where an image cannot be decoded or gives no finite numbers.
        """
        return self.encode_pixels(self.image_pixels([*images, *references]), len(images))

    def image_pixels(self, images: Sequence["Image"]) -> Tensor:
        """Images as the image tower reads them [I, 3, H, W], on the CPU. Raises `ImageError` for a damaged one."""
        tower, _ = self._two_towers()
        pixels = [tower.preprocess(rgb_of(image)) for image in images]
        return torch.stack(pixels)

    def encode_pixels(self, pixels_I3HW: Tensor, num_images: int) -> ImageFeatures:
        """`image_features` of `image_pixels`: the first `num_images` are the question's own, the others references."""
        tower, fusion = self._two_towers()
        pixels_I3HW = pixels_I3HW.to(self.device)
        if not bool(pixels_I3HW.isfinite().all()):
            raise ImageError("image_not_finite: an image has pixels that are no finite numbers")
        tokens = tower(pixels_I3HW)
        patches_IPW = tokens.patches_BPD if fusion.reads_patches else None
        is_finite = bool(tokens.pooled_BD.isfinite().all())
        if patches_IPW is not None:
            is_finite = is_finite and bool(patches_IPW.isfinite().all())
        if not is_finite:
            raise ImageError(
                "image_not_finite: the image tower makes no finite numbers of an image; look at its weights"
            )
        num_references = len(pixels_I3HW) - num_images
        image_rows, reference_rows = range(num_images), range(num_images, num_images + num_references)
        return ImageFeatures.gather(tokens.pooled_BD, patches_IPW, [image_rows], [reference_rows])

    @torch.inference_mode()
    def image_log_odds(self, states: Sequence[SolutionStates], features: ImageFeatures) -> list[list[float]]:
        """What one question's images add to the log-odds of each solution's steps."""
        _, fusion = self._two_towers()
        states_TD = torch.cat([solution.states_TD for solution in states])
        summaries_TD = torch.cat([solution.summaries_TD for solution in states])
        delta_TD = fusion(states_TD, summaries_TD, features)
        num_steps = [len(solution.states_TD) for solution in states]
        parts = torch.split(self.head_log_odds(delta_TD), num_steps)
        return [part.tolist() for part in parts]

    @torch.inference_mode()
    def patch_attention(
        self, states: Sequence[SolutionStates], features: ImageFeatures
    ) -> list[list[StepAttention]] | None:
        """Where the attention of each solution's steps lies on the question's first image.

        None where the fusion reads pooled tokens alone. What weight a patch has is not what it changes of the score:
        that is what `occlusion` measures.
        """
        _, fusion = self._two_towers()
        if not fusion.reads_patches:
            return None
        states_TD = torch.cat([solution.states_TD for solution in states])
        summaries_TD = torch.cat([solution.summaries_TD for solution in states])
        weights_TP = fusion.patch_weights(states_TD, summaries_TD, features).float()
        num_steps = [len(solution.states_TD) for solution in states]
        return [list(map(StepAttention.of, of_solution)) for of_solution in torch.split(weights_TP, num_steps)]

    def _two_towers(self) -> "tuple[ImageTower, Fusion]":
        if self.image_tower is None or self.fusion is None:
            raise ValueError("this reward model is text-only: it has no image tower; score without image")
        return self.image_tower, self.fusion

    # Scoring

    def score(
        self,
        question: str,
        solutions: Sequence[Solution],
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
        for request, states in self.iter_states(requests, token_budget=token_budget):
            try:
                features = self.features_of(request)
            except ImageError as error:
                yield [StepScores(error=str(error)) for _ in states]
            else:
                yield self.step_scores(states, features)

    def features_of(self, request: ScoreRequest) -> ImageFeatures | None:
        """A request's images as the fusion reads them (`image_features`); None where it has none, or where the language
        model has read them with the text."""
        if self.vision or not request.images:
            return None
        return self.image_features(request.images, request.reference_images)

    def step_scores(self, states: Sequence[SolutionStates], features: ImageFeatures | None) -> list[StepScores]:
        """The scores of solutions that were read, with one question's images or without; an error, not a score, where
        the image part of one is not finite."""
        text_parts: list[list[float]] = [solution.log_odds_T.tolist() for solution in states]
        if features and states:
            image_parts = self.image_log_odds(states, features)
        else:
            image_parts = [[0.0] * len(text) for text in text_parts]
        return [_scores(*parts) for parts in zip(states, text_parts, image_parts, strict=True)]


def _scores(states: SolutionStates, text_log_odds: list[float], image_log_odds: list[float]) -> StepScores:
    error = states.error
    num_missing = sum(not math.isfinite(x) for x in image_log_odds)
    if num_missing and error is None:
        error = (
            f"not_finite: the image part of {num_missing} of {len(image_log_odds)} steps is not finite; look for NaN "
            "among the fusion's weights"
        )
    if error:
        return StepScores(error=error)
    return StepScores(text_log_odds, image_log_odds, num_documents=states.num_documents)
