"""The image's part of a step's score: the tag's state attends to the image tokens, which gives a change of the state.

Enters: the text tower's states at the step tags, a summary of each step, and the image tower's tokens of the question's
images and of its reference images. Leaves: ``delta_TD``, to be added to the states before the head. The last projection
starts at zero (as LoRA's B), so an untrained fusion changes nothing.

Legend: T tags, D text width, Q questions, I image slots a question, W image width, P patches, M tokens, F fusion width,
S most tags of one question, H heads, E width of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from medmm_ray.engines.onednn_linear import use_onednn

Tokens = Literal["pooled", "patches", "both"]
_KINDS = 4  # pooled and patch tokens of the question's images, pooled and patch tokens of references


@dataclass(frozen=True)
class FusionConfig:
    """What the fusion attends to, and how wide it is.

    `tokens`: the image tower's pooled token, its patch tokens, or both (step AUROC on hard phantoms, three seeds: .781
    ± .007, .729 ± .014, .791 ± .010). `summary`: the query also carries the mean state of the step's tokens from a
    middle layer (.781 against .621 ± .012 without). `width` of the attention and the MLP, None for the text tower's.
    `reference_weight`: what all reference images together weigh against the question's own at the start.
    """

    tokens: Tokens = "pooled"
    summary: bool = True
    width: int | None = None
    num_heads: int = 4
    mlp_ratio: int = 2
    reference_weight: float = 0.5
    dropout: float = 0.0


@dataclass(frozen=True)
class ImageFeatures:
    """Image tokens of Q questions: slots that are not `present` get no weight.

    `pooled_QIW`, `patches_QIPW` (None where the fusion does not read patches), `present_QI` and `reference_QI` bool.
    """

    pooled_QIW: Tensor
    patches_QIPW: Tensor | None
    present_QI: Tensor
    reference_QI: Tensor

    @classmethod
    def gather(
        cls,
        pooled_BW: Tensor,
        patches_BPW: Tensor | None,
        images: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
    ) -> "ImageFeatures":
        """From encoded images: for each question the rows of its own images and of its references."""
        rows = [[*of_images, *of_references] for of_images, of_references in zip(images, references, strict=True)]
        num_slots = max(1, *(len(of_question) for of_question in rows))
        rows_QI = torch.zeros(len(images), num_slots, dtype=torch.long)
        present_QI = torch.zeros(len(images), num_slots, dtype=torch.bool)
        reference_QI = torch.zeros(len(images), num_slots, dtype=torch.bool)
        for q, of_question in enumerate(rows):
            num_taken = len(of_question)
            rows_QI[q, :num_taken] = torch.tensor(of_question, dtype=torch.long)
            present_QI[q, :num_taken] = True
            reference_QI[q, len(images[q]) : num_taken] = True
        device = pooled_BW.device
        rows_QI = rows_QI.to(device)
        return cls(
            pooled_BW[rows_QI],
            None if patches_BPW is None else patches_BPW[rows_QI],
            present_QI.to(device),
            reference_QI.to(device),
        )


class Fusion(nn.Module):
    """Tag states and image tokens to a change of the tag states; exactly zero where a question has no image."""

    def __init__(self, config: FusionConfig, text_width: int, image_width: int) -> None:
        super().__init__()
        width = config.width or text_width
        if width % config.num_heads:
            raise ValueError(f"fusion width {width} is not a multiple of num_heads={config.num_heads}; change one")
        if not 0 < config.reference_weight <= 1:
            raise ValueError(f"reference_weight is {config.reference_weight}; expected a number in (0, 1]")
        self.config, self.text_width, self.image_width, self.width = config, text_width, image_width, width
        self.state_norm = nn.LayerNorm(text_width)
        self.summary_norm = nn.LayerNorm(text_width) if config.summary else None
        num_inputs = 2 if config.summary else 1
        self.query = nn.Linear(text_width * num_inputs, width)
        self.projector = nn.Sequential(
            nn.LayerNorm(image_width), nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.kinds = nn.Embedding(_KINDS, width)
        nn.init.normal_(self.kinds.weight, std=0.02)
        # A logarithm, as it is added to the attention's logits.
        self.reference_bias = nn.Parameter(torch.tensor(math.log(config.reference_weight)))
        self.attend_query = nn.Linear(width, width, bias=False)
        self.attend_key = nn.Linear(width, width, bias=False)
        self.attend_value = nn.Linear(width, width, bias=False)
        self.attend_out = nn.Linear(width, width, bias=False)
        # The product lets the MLP compare what the step says with what the image shows.
        self.mlp = nn.Sequential(
            nn.LayerNorm(3 * width),
            nn.Linear(3 * width, config.mlp_ratio * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp_ratio * width, width),
            nn.GELU(),
        )
        # Zero, as LoRA's B: a fusion that is not trained changes no score.
        self.output = nn.Linear(width, text_width, bias=False)
        nn.init.zeros_(self.output.weight)
        use_onednn(self)

    @property
    def reads_patches(self) -> bool:
        """Whether it needs the patch tokens, not the pooled ones alone."""
        return self.config.tokens != "pooled"

    def forward(
        self, states_TD: Tensor, summaries_TD: Tensor, images: ImageFeatures, question_T: Tensor | None = None
    ) -> Tensor:
        """``delta_TD``, in the fusion's own dtype.

        Args:
            question_T: which of the Q questions each tag belongs to; None where there is one question.
        """
        dtype = self.output.weight.dtype
        if question_T is None:
            question_T = torch.zeros(len(states_TD), dtype=torch.long, device=states_TD.device)
        query_TF = self._query(states_TD.to(dtype), summaries_TD.to(dtype))
        tokens_QMF, bias_QM = self._tokens(images, dtype)

        # Tags side by side by question, so that a question's tokens are laid out once.
        slot_T = _slots(question_T)
        num_slots = int(slot_T.max()) + 1 if len(slot_T) else 1
        query_QSF = query_TF.new_zeros(len(tokens_QMF), num_slots, self.width)
        query_QSF[question_T, slot_T] = query_TF
        image_TF = self._attend(query_QSF, tokens_QMF, bias_QM)[question_T, slot_T]

        mixed_TF = self.mlp(torch.cat([query_TF, image_TF, query_TF * image_TF], dim=-1))
        delta_TD = self.output(mixed_TF)
        # References alone say nothing of this patient.
        has_image_Q = (images.present_QI & ~images.reference_QI).any(dim=1)
        return cast(Tensor, delta_TD.masked_fill(~has_image_Q[question_T, None], 0.0))

    def patch_weights(self, states_TD: Tensor, summaries_TD: Tensor, images: ImageFeatures) -> Tensor:
        """What each tag of one question attends to among the patches of its first image [T, P], the heads' mean.

        With the weights of all other tokens (its pooled one, other images and references) a tag's add up to 1.
        """
        if images.patches_QIPW is None or not self.reads_patches:
            raise ValueError(f"fusion reads tokens={self.config.tokens!r}: there is no attention over patches")
        dtype = self.output.weight.dtype
        query_1TF = self._query(states_TD.to(dtype), summaries_TD.to(dtype))[None]
        tokens_1MF, bias_1M = self._tokens(images, dtype)
        query_1HTE, key_1HME = self._heads(self.attend_query(query_1TF)), self._heads(self.attend_key(tokens_1MF))
        # By hand: PyTorch's fused attention, which the forward pass uses, keeps its weights to itself.
        logits_1HTM = query_1HTE @ key_1HME.transpose(2, 3) / math.sqrt(query_1HTE.shape[3])
        weights_TM = (logits_1HTM + bias_1M[:, None, None]).softmax(dim=-1)[0].mean(dim=0)
        num_images, num_patches = images.patches_QIPW.shape[1:3]
        # The pooled tokens of all images stand before the patches.
        start = num_images if self.config.tokens == "both" else 0
        return weights_TM[:, start : start + num_patches]

    def _query(self, states_TD: Tensor, summaries_TD: Tensor) -> Tensor:
        query = self.state_norm(states_TD)
        if self.summary_norm is not None:
            query = torch.cat([query, self.summary_norm(summaries_TD)], dim=-1)
        return cast(Tensor, self.query(query))

    def _tokens(self, images: ImageFeatures, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All image tokens of each question as keys and values [Q, M, F], and what is added to their logits [Q, M]."""
        reference_QI = images.reference_QI.long()
        num_references_Q1 = (images.reference_QI & images.present_QI).sum(dim=1, keepdim=True).clamp(min=1)
        # K references share one weight, or they would outvote the question's own image.
        share_QI = self.reference_bias - num_references_Q1.to(dtype).log()
        bias_QI = torch.where(images.reference_QI, share_QI, torch.zeros_like(share_QI))
        bias_QI = bias_QI.masked_fill(~images.present_QI, torch.finfo(dtype).min)
        tokens, biases = [], []
        if self.config.tokens != "patches":
            tokens.append(self.projector(images.pooled_QIW.to(dtype)) + self.kinds(2 * reference_QI))
            biases.append(bias_QI)
        if self.config.tokens != "pooled":
            if images.patches_QIPW is None:
                raise ValueError(f"fusion reads tokens={self.config.tokens!r}, but the images came without patches")
            patches_QIPF = self.projector(images.patches_QIPW.to(dtype)) + self.kinds(2 * reference_QI + 1)[:, :, None]
            tokens.append(patches_QIPF.flatten(1, 2))
            # An image's patches together weigh what its pooled token does, or 64 of them would drown it.
            num_patches = patches_QIPF.shape[2]
            biases.append((bias_QI - math.log(num_patches)).repeat_interleave(num_patches, dim=1))
        return torch.cat(tokens, dim=1), torch.cat(biases, dim=1)

    def _attend(self, query_QSF: Tensor, tokens_QMF: Tensor, bias_QM: Tensor) -> Tensor:
        image_QHSE = nn.functional.scaled_dot_product_attention(
            self._heads(self.attend_query(query_QSF)),
            self._heads(self.attend_key(tokens_QMF)),
            self._heads(self.attend_value(tokens_QMF)),
            attn_mask=bias_QM[:, None, None, :],
        )
        return cast(Tensor, self.attend_out(image_QHSE.transpose(1, 2).flatten(2)))

    def _heads(self, x_QSF: Tensor) -> Tensor:
        """[Q, S, F] cut into heads: [Q, H, S, E]."""
        return x_QSF.reshape(*x_QSF.shape[:2], self.config.num_heads, -1).transpose(1, 2)


def _slots(question_T: Tensor) -> Tensor:
    """Each tag's place among the tags of its question."""
    order_T = torch.argsort(question_T, stable=True)
    ordered_T = question_T[order_T]
    first_T = torch.searchsorted(ordered_T, ordered_T)
    slot_T = torch.empty_like(order_T)
    slot_T[order_T] = torch.arange(len(order_T), device=order_T.device) - first_T
    return slot_T
