"""Pictures as the pixels that an image tower takes, without the tower: its weights are not loaded.

Enters: an upright RGB picture. Leaves: pixels_3HW, resized and normalised as the checkpoint says; H and W are equal.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL.Image import Image

if TYPE_CHECKING:
    from torch import Tensor

Area = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of a picture's width and height; outside 0 to 1 where it is padded."""
Resize = Literal["squash", "shortest", "longest"]
"""How a picture becomes a square, by open_clip's names: whole, cut at its longer side, padded at its shorter one."""

_MAX_ASPECT = 16  # longer side over shorter side


class Preprocess(Protocol):
    """A checkpoint's own preprocessing."""

    image_size: int
    """A side of the pixels."""
    resize: Resize
    """What of a picture they show (`seen_area`)."""

    def __call__(self, image: Image) -> "Tensor":
        """An RGB picture as pixels_3HW."""


class ClipPreprocess:
    """That of an open_clip folder, by its config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        self.image_size = int(config["model_cfg"]["vision_cfg"].get("image_size", 224))
        # The vision half's own size wins over the preprocessing section's, as in open_clip.
        settings = merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg", {}))
        self._transform = image_transform_v2(PreprocessCfg(**{**settings, "size": self.image_size}), is_train=False)
        self.resize: Resize = settings["resize_mode"]

    def __call__(self, image: Image) -> "Tensor":
        """As the checkpoint's own transform; where that keeps the ratio, a very long picture is cropped first."""
        pixels_3HW: Tensor = self._transform(image if self.resize == "squash" else _centre_crop(image))
        return pixels_3HW


class ProcessorPreprocess:
    """That of a transformers folder, by its image processor."""

    resize: Resize = "squash"

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        size = processor.crop_size if processor.do_center_crop else processor.size
        self.image_size = int(size["height"])

    def __call__(self, image: Image) -> "Tensor":
        """As the checkpoint's own processor, but for its crop."""
        # Squashed, not cropped as the checkpoint's own settings say: a finding may lie at the border. On VQA-RAD the
        # nearest picture shows the same organ for 98.4 % squashed, 97.5 % cropped, 97.5 % padded (DINOv2 ViT-S).
        side = {"height": self.image_size, "width": self.image_size}
        pixels_13HW: Tensor = self._processor(
            images=[image], size=side, do_center_crop=False, input_data_format="channels_first", return_tensors="pt"
        )["pixel_values"]
        return pixels_13HW[0]


def seen_area(resize: Resize, width: int, height: int) -> Area:
    """The part of a picture of this size that its pixels show: all of it, or a square about its middle."""
    if resize == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    side = max(width, height) if resize == "longest" else min(width, height)
    # Where the square is wider than the picture, its edges lie outside.
    left, top = (1 - side / width) / 2, (1 - side / height) / 2
    return (left, top, 1 - left, 1 - top)


def _centre_crop(image: Image) -> Image:
    """The middle of a picture that is extremely long: resized as it is, one of 1 x 1,000,000 would take 150 GB."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    x = max(image.width - longest, 0) // 2
    y = max(image.height - longest, 0) // 2
    return image.crop((x, y, x + min(image.width, longest), y + min(image.height, longest)))
