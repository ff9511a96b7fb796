"""Image files as RGB pictures (PIL only).

Enters: a path or URI on any pyarrow filesystem, or the bytes of a file. Leaves: an upright 8-bit RGB `PIL.Image`.
A file that cannot become one raises `RowError` of kind image_missing, image_empty, image_corrupt or image_too_large.
"""

import io
import struct

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from medmm_ray.tables import RowError, TableError, filesystem

# PIL's own limit: above it, a small file that claims a huge canvas could fill the memory (a decompression bomb).
MAX_PIXELS = 89_478_485
# Raster formats only: PIL would hand EPS to Ghostscript, and some rare decoders are little tested.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
# What PIL's decoders raise on damaged files (UnidentifiedImageError is an OSError).
_DECODE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
)


def read_bytes(uri: str) -> bytes:
    """The content of a file; raises `RowError` image_missing or image_empty."""
    try:
        fs, path = filesystem(uri)
        with fs.open_input_stream(path, compression=None) as stream:
            content = bytes(stream.read())
    except FileNotFoundError:
        raise RowError("image_missing", f"{uri} does not exist") from None
    except (OSError, pa.ArrowException, TableError) as error:
        raise RowError("image_missing", f"{uri} cannot be read: {error}") from error
    if not content:
        raise RowError("image_empty", f"{uri} has 0 bytes")
    return content


def open_image(uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, 8-bit RGB, turned upright; `max_pixels` bounds width x height before decoding."""
    return decode_image(read_bytes(uri), uri, max_pixels)


def decode_image(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in the bytes of an image file; `name` is what error messages call it.

    16-bit and float greyscale is scaled by its own range, transparency shows white, CMYK and palettes are converted,
    the first frame of an animation is taken.
    """
    if not content:
        raise RowError("image_empty", f"{name} has 0 bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise RowError(
                "image_too_large", f"{name} is {image.width} x {image.height} pixels, more than {max_pixels}"
            )
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image_too_large", f"{name}: {error}") from None
    except _DECODE_FAULTS as error:
        raise RowError("image_corrupt", f"{name} is not a readable image ({len(content)} bytes): {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
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
