"""Image files as RGB pictures (PIL only).

Enters: a path or URI on any pyarrow filesystem, or the bytes of a file. Leaves: an upright 8-bit RGB `PIL.Image`.
A file that cannot become one raises `RowError` of kind image_missing, image_empty, image_corrupt or image_too_large.
"""

import io
import struct

import pyarrow as pa
from PIL import Image

from medmm_ray.engines.pixels import upright_rgb
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

    Of any kind (`pixels.upright_rgb`); of an animation the first frame.
    """
    if not content:
        raise RowError("image_empty", f"{name} has 0 bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise RowError(
                "image_too_large", f"{name} is {image.width} x {image.height} pixels, more than {max_pixels}"
            )
        return upright_rgb(image)
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image_too_large", f"{name}: {error}") from None
    except _DECODE_FAULTS as error:
        raise RowError("image_corrupt", f"{name} is not a readable image ({len(content)} bytes): {error}") from error
