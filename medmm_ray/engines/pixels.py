"""Pictures of every kind as upright 8-bit RGB; needs PIL alone."""

import struct

import numpy as np
from PIL import ExifTags, Image

# What PIL's decoders and its EXIF parser raise on damaged files (UnidentifiedImageError is an OSError).
DECODE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
)
WINDOW_PERCENTILES = (1.0, 99.0)
"""Percentiles of greyscale with more than 8 bits that become black and white: a burnt-in marker at the type's maximum,
or a few hot pixels, must not darken the anatomy."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture with this EXIF orientation is turned upright (Exif 2.32, tag 0x0112)."""


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as its viewer sees it, 8-bit RGB.

    Turned as its EXIF tag says; 16-bit and float greyscale windowed by its percentiles (`WINDOW_PERCENTILES`),
    transparency shown white, CMYK and palettes converted; of an animation the frame that it stands at. Raises OSError
    where the file behind it is damaged.
    """
    try:
        image.load()
        picture = _to_rgb(_upright(image))
    except OSError:
        raise
    except DECODE_FAULTS as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    picture.info = {}  # else it would still say how it was turned
    return picture


def _upright(image: Image.Image) -> Image.Image:
    """A picture turned by its EXIF orientation; no other entry is looked at, so that an odd one does no harm."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODE_FAULTS:  # EXIF data that nobody can parse says nothing of the orientation; the pixels are sound
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _windowed(np.asarray(image, dtype=np.float64))
    if image.has_transparency_data:
        # Upon white: what a transparent pixel hides is often black.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _windowed(values_HW: np.ndarray) -> Image.Image:
    """Greyscale of more than 8 bits (PIL alone would clip all above 255); what is not finite is shown black.

    Where both percentiles fall on one value, as with a small bright object on a flat ground, the whole range is shown.
    """
    finite = values_HW[np.isfinite(values_HW)]
    if not finite.size:
        return Image.fromarray(np.zeros(values_HW.shape, np.uint8)).convert("RGB")
    low, high = np.percentile(finite, WINDOW_PERCENTILES)
    if low == high:
        low, high = finite.min(), finite.max()
    scale = 255.0 / (high - low) if high > low else 0.0
    windowed_HW = np.where(np.isfinite(values_HW), values_HW, low).clip(low, high)
    grey_HW = (windowed_HW - low) * scale
    return Image.fromarray(np.rint(grey_HW).astype(np.uint8)).convert("RGB")
