"""Stage `image_text`: contrastive training of a small CLIP on captioned images (open_clip's model, CLIP's loss).

Enters: training images with captions. Leaves: a folder in open_clip's own format (``local-dir:``), which
`ImageTower.from_pretrained` reads; its tokenizer, made from the captions, lies beside it.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import Config
from medmm_ray.engines.tokenizer import build_tokenizer
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.gathering import gathered_rows
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.reading import Cache, ReadAhead
from medmm_ray.train.schedule import Part, Units
from medmm_ray.train.stage import Stage
from medmm_ray.train.throughput import num_weights

if TYPE_CHECKING:
    import torch

VERSION = 1  # of what a step makes: raise it when the same config makes something else
CACHE_BYTES = 1 << 30  # of pixels that a worker keeps for later epochs
READING_THREADS = 2
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class ClipShape(Config):
    """A small CLIP. 64 pixels, patches of 8 and 128 x 4 train at 330 images/s on two cores; 96 pixels at 140."""

    image_size: int = Field(64, ge=1)
    """Side of the picture, in pixels."""
    patch_size: int = 8
    """Side of a patch, in pixels."""
    width: int = 128
    """Width of both halves."""
    num_layers: int = 4
    """Blocks of the image half."""
    num_text_layers: int = 2
    """Blocks of the text half."""
    num_heads: int = 4
    """Attention heads of both halves."""
    embed_dim: int = 128
    """Length of the common embedding."""
    context_length: int = 64
    """Tokens of a text that the text half reads; the rest is cut."""
    vocab_size: int = 1024
    """Entries of its own tokenizer."""


class ImageTextConfig(TrainConfig):
    """Contrastive training of the image tower."""

    shape: ClipShape = ClipShape()
    """The model."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate."""
    epochs: int = Field(20, ge=1)
    """Times that every image is seen, each time with one of its captions."""
    batch_size: int = Field(128, ge=1)
    """Images of one update, over all workers."""
    contrast_size: int = Field(128, ge=1)
    """Images that are told apart from each other, over all workers. An update of more holds several such groups."""
    max_shift: int = Field(3, ge=0)
    """Augmentation: pictures move by up to so many pixels. They are never mirrored: left and right are findings."""
    max_brightness: float = Field(0.1, ge=0, le=1)
    """Augmentation: brightness changes by up to this share of the full range."""


def train_image_tower(
    config: ImageTextConfig,
    captions: pa.Table,
    folder: str,
    name: str,
) -> dict[str, float]:
    """Train the tower under Ray Train and leave it in `folder`; gives `launch.figures`.

    `captions` has the columns image_uri and captions (a list), of training images only; the tokenizer's vocabulary is
    made of them.
    """
    if captions.num_rows == 0:
        raise ValueError(
            "train_image_tower: no training image has a caption. Choose a source that has captions, or name a "
            "pretrained tower (models.image_tower=...)."
        )
    captions = captions.select(["image_uri", "captions"]).sort_by("image_uri")
    return fit(
        ImageTextStage,
        config,
        {"captions": captions},
        {},
        folder,
        name,
    )


class ImageTextStage(Stage):
    """Captioned images and the CLIP that learns which belong together."""

    joint = True

    def __init__(
        self,
        config: ImageTextConfig,
        inputs: dict[str, str],
        device: str,
    ) -> None:
        import torch
        from open_clip import CLIP

        self.config = config
        self.device = device
        images = read_input(inputs["captions"])
        captions = images["captions"].to_pylist()
        uris = images["image_uri"].to_pylist()
        # The loss contrasts the pairs of one forward pass, so its micro-batch is a setting of the model.
        self.micro_batch_budget = config.contrast_size
        vocabulary: list[str] = []
        for image_captions in captions:
            vocabulary += image_captions
        self.tokenizer = build_tokenizer(
            vocabulary,
            config.shape.vocab_size,
            ends_texts=True,
        )
        self.model_config = model_config(
            config.shape,
            len(self.tokenizer),
            int(self.tokenizer.eos_token_id),
        )
        torch.manual_seed(config.seed)
        self.module: Any = CLIP(**self.model_config)
        self.units = Units.singles(uris, clip_flops(self.module))
        self.transform = pixel_transform(config.shape.image_size)
        # Opened by the workers that meet them, ahead of time; the augmentation of an epoch works on pixels in memory.
        self.pixels: Cache[torch.Tensor] = Cache(CACHE_BYTES)
        self.ahead: ReadAhead[list[torch.Tensor]] = ReadAhead(READING_THREADS)
        self.ids = [self._encode(image_captions) for image_captions in captions]

    def _encode(self, captions: Sequence[str]) -> "torch.Tensor":
        length = self.config.shape.context_length
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids_CL: torch.Tensor = encoded["input_ids"]
        return ids_CL

    def prepare(self, parts: Sequence[Part], epoch: int | None) -> None:
        """Have the pictures of a pass to come opened by threads."""
        self.ahead.begin((epoch, tuple(parts)), lambda: self._open(parts))

    def _open(self, parts: Sequence[Part]) -> "list[torch.Tensor]":
        """The pixels [3, H, W] of some pictures."""
        from medmm_ray.engines.images import open_image

        pictures: list[torch.Tensor] = []
        for unit, _ in parts:
            pixels_3HW = self.pixels.get(unit)
            if pixels_3HW is None:
                pixels_3HW = self.transform(open_image(self.units.names[unit]))
                self.pixels.put(unit, pixels_3HW, pixels_3HW.nbytes)
            pictures.append(pixels_3HW)
        return pictures

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """CLIP's contrastive loss of these pairs against those of all workers, summed over the pairs.

        open_clip's own loss over several processes wants as many pairs in each; a group need not divide evenly.
        """
        import torch

        pictures: list[torch.Tensor] = []
        captions: list[torch.Tensor] = []
        opened = self.ahead.result((epoch, tuple(parts)), lambda: self._open(parts))
        for (unit, _), pixels_3HW in zip(parts, opened, strict=True):
            # By place, not by name: a copy of the run in another folder trains the same.
            rng = random.Random(f"{self.config.seed}/{epoch}/{unit}")
            pictures.append(augment(pixels_3HW, rng, self.config.max_shift, self.config.max_brightness))
            captions.append(rng.choice(self.ids[unit]))
        pixels_B3HW = torch.stack(pictures)
        ids_BL = torch.stack(captions)
        dtype = self.module.visual.conv1.weight.dtype
        images_BE = self.module.encode_image(pixels_B3HW.to(self.device, dtype), normalize=True).float()
        texts_BE = self.module.encode_text(ids_BL.to(self.device), normalize=True).float()
        scale = self.module.logit_scale.exp().clamp(max=100.0)  # CLIP's own bound
        if self.idle:  # it takes part in the collectives, and has no row of its own
            images_BE, texts_BE = images_BE[:0], texts_BE[:0]
        return contrastive_loss(images_BE, texts_BE, scale.float())

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Write the CLIP with its tokenizer in open_clip's folder format."""
        from medmm_ray.engines.image_tower import save_open_clip

        save_open_clip(
            folder,
            self.model_config,
            self.module.state_dict(),
            self.tokenizer,
            MEAN,
            STD,
        )


def contrastive_loss(
    images_BE: "torch.Tensor",
    texts_BE: "torch.Tensor",
    scale: "torch.Tensor",
) -> "torch.Tensor":
    """The cross-entropy of each picture among all workers' texts and of each text among all pictures, halved, summed
    over this worker's pairs."""
    import torch

    (all_images_NE, start), (all_texts_NE, _) = gathered_rows(images_BE), gathered_rows(texts_BE)
    own_B = torch.arange(
        start,
        start + len(images_BE),
        device=images_BE.device,
    )
    loss = scale.new_zeros(())
    for queries_BE, keys_NE in ((images_BE, all_texts_NE), (texts_BE, all_images_NE)):
        logits_BN = scale * queries_BE @ keys_NE.T
        loss = loss + torch.nn.functional.cross_entropy(logits_BN, own_B, reduction="sum") / 2
    return loss


def clip_flops(module: Any) -> float:
    """FLOPs of training on one pair, six a weight of the blocks and a token."""
    halves = (
        (module.visual.transformer, module.visual.positional_embedding),
        (module.transformer, module.positional_embedding),
    )
    flops = 0.0
    for blocks, positions in halves:
        flops += 6.0 * num_weights([blocks]) * len(positions)
    return flops


def model_config(
    shape: ClipShape,
    vocab_size: int,
    end_id: int,
) -> dict[str, Any]:
    """open_clip's ``model_cfg``. A text is read off at its end token."""
    return {
        "embed_dim": shape.embed_dim,
        "vision_cfg": {
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "width": shape.width,
            "layers": shape.num_layers,
            "head_width": shape.width // shape.num_heads,
        },
        "text_cfg": {
            "context_length": shape.context_length,
            "vocab_size": vocab_size,
            "width": shape.width,
            "heads": shape.num_heads,
            "layers": shape.num_text_layers,
            "hf_tokenizer_name": "local",  # any name: a folder's own tokenizer is taken
            "pool_type": "eos",
            "eos_id": end_id,
            "pad_id": 0,
        },
    }


def pixel_transform(side: int) -> Any:
    """What makes pixels_3HW of a picture, exactly as the saved tower will (48 kB each at 64 pixels)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=side, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="squash")
    return image_transform_v2(settings, is_train=False)


def augment(
    pixels_3HW: "torch.Tensor",
    rng: random.Random,
    max_shift: int,
    max_brightness: float,
) -> "torch.Tensor":
    """Move the picture, its border repeated, and change its brightness. It is never mirrored."""
    import torch

    right = rng.randint(-max_shift, max_shift)
    down = rng.randint(-max_shift, max_shift)
    brightness = rng.uniform(-max_brightness, max_brightness) / STD[0]  # pixels are normalised already
    if max_shift:
        height, width = pixels_3HW.shape[1:]
        padded = torch.nn.functional.pad(pixels_3HW[None], [max_shift] * 4, mode="replicate")[0]
        y = max_shift - down
        x = max_shift - right
        pixels_3HW = padded[:, y : y + height, x : x + width]
    return pixels_3HW + brightness
