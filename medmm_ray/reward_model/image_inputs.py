"""Pictures in memory, as they are given to a reward model: checked, and the same as from a file."""

from typing import Any

from PIL.Image import Image

from medmm_ray.engines.pixels import upright_rgb
from medmm_ray.reward_model.errors import ImageError


def rgb_of(image: Any) -> Image:
    """A PIL image of any kind as upright 8-bit RGB (`pixels.upright_rgb`).

    Raises `TypeError` for what is no PIL image, `ImageError` (``kind: message``) for one that is empty or damaged.
    """
    if not isinstance(image, Image):
        raise TypeError(f"an image is a {type(image).__name__}; expected a PIL image (PIL.Image.open reads one)")
    if 0 in image.size:
        raise ImageError(f"image_empty: an image is {image.width} x {image.height} pixels")
    try:
        return upright_rgb(image)
    except OSError as error:  # PIL decodes late: a damaged file shows itself here
        raise ImageError(f"image_corrupt: an image cannot be decoded: {error}") from error
