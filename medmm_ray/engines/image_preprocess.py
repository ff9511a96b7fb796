"""Pictures as the pixels that an image tower takes, without the tower: its weights are not loaded.

Enters: an upright RGB picture. Leaves: pixels_3HW, resized and normalised as the checkpoint says; H and W are equal.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from PIL.Image import Image

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ASPECT = 16  # longer side over shorter side


class Preprocess(Protocol):
    """A checkpoint's own preprocessing."""

    image_size: int
    """A side of the pixels."""

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
        self._keeps_ratio = settings["resize_mode"] != "squash"

    def __call__(self, image: Image) -> "Tensor":
        """As the checkpoint's own transform; where that keeps the ratio, a very long picture is cropped first."""
        pixels_3HW: Tensor = self._transform(_centre_crop(image) if self._keeps_ratio else image)
        return pixels_3HW


class ProcessorPreprocess:
    """That of a transformers folder, by its image processor."""

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


def _centre_crop(image: Image) -> Image:
    """The middle of a picture that is extremely long: resized as it is, one of 1 x 1,000,000 would take 150 GB."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    x = max(image.width - longest, 0) // 2
    y = max(image.height - longest, 0) // 2
    return image.crop((x, y, x + min(image.width, longest), y + min(image.height, longest)))
