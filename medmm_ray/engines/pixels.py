"""Pictures of every kind as upright 8-bit RGB; needs PIL alone."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as its viewer sees it, 8-bit RGB.

    Turned as its EXIF tag says; 16-bit and float greyscale scaled by its own range, transparency shown white, CMYK and
    palettes converted; of an animation the frame that it stands at. Raises what PIL's decoders raise.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_range(np.asarray(image, dtype=np.float64))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_range(values_HW: np.ndarray) -> Image.Image:
    """Greyscale of more than 8 bits: lowest value black, highest white (PIL alone would clip all above 255)."""
    finite = np.isfinite(values_HW)
    low, high = (values_HW[finite].min(), values_HW[finite].max()) if finite.any() else (0.0, 0.0)
    scaled = (np.where(finite, values_HW, low) - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
