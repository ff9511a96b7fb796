"""Image files as RGB pictures (PIL only).

Enters: a path or URI on any pyarrow filesystem, or the bytes of a file. Leaves: an upright 8-bit RGB `PIL.Image`.
A file that cannot become one raises `RowError` of kind image_missing, image_empty, image_format (a format that is not
read here), image_corrupt or image_too_large.
"""

import io
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from medmm_ray.data.tables import RowError, TableError, filesystem
from medmm_ray.engines.pixels import DECODE_FAULTS, upright_rgb

# PIL's own limit: above it, a small file that claims a huge canvas could fill the memory (a decompression bomb).
MAX_PIXELS = 89_478_485
# Raster formats only: PIL would hand EPS to Ghostscript, and some rare decoders are little tested.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


@dataclass(frozen=True)
class _OtherFormat:
    """A format that comes among pictures and is none of `FORMATS`: its signatures, one of which stands `start` bytes
    into a file, and what to do about it."""

    name: str
    start: int
    signatures: tuple[bytes, ...]
    remedy: str


_TO_PNG = "convert it to PNG first"
_DOWNLOAD = "get the file itself"
# The last two come from downloads that did not give the file.
_OTHER_FORMATS = (
    _OtherFormat("a DICOM file", 128, (b"DICM",), "write its pixels as a 16-bit PNG first (pydicom reads them)"),
    _OtherFormat("a HEIC picture", 4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"), _TO_PNG),
    _OtherFormat("an AVIF picture", 4, (b"ftypavif", b"ftypavis"), _TO_PNG),
    _OtherFormat("a video", 4, (b"ftypisom", b"ftypmp42", b"ftypqt  "), "take the frame that the question is about"),
    _OtherFormat("a NIfTI volume", 344, (b"n+1\0", b"ni1\0"), "write the slice that the question is about as a PNG"),
    _OtherFormat("a JPEG XL picture", 0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), _TO_PNG),
    _OtherFormat("a Photoshop file", 0, (b"8BPS",), _TO_PNG),
    _OtherFormat("a PDF file", 0, (b"%PDF",), "take the picture out of it"),
    _OtherFormat("a gzip archive", 0, (b"\x1f\x8b",), "unpack it"),
    _OtherFormat("a zip archive", 0, (b"PK\3\4",), "unpack it"),
    _OtherFormat("a web page", 0, (b"<!doctype html", b"<!DOCTYPE html", b"<html", b"<HTML"), _DOWNLOAD),
    _OtherFormat("an SVG drawing", 0, (b"<svg", b"<?xml"), _TO_PNG),
    _OtherFormat("a git-lfs pointer", 0, (b"version https://git-lfs",), f"{_DOWNLOAD}: git lfs pull"),
)


def _other_format(content: bytes) -> _OtherFormat | None:
    for file_format in _OTHER_FORMATS:
        if content.startswith(file_format.signatures, file_format.start):
            return file_format
    return None


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

    It may be of any kind (`pixels.upright_rgb`); an animation gives its first frame. Raises `RowError`, of the kinds in
    the module's docstring.
    """
    if not content:
        raise RowError("image_empty", f"{name} has 0 bytes")
    file_format = _other_format(content)
    if file_format is not None:
        raise RowError(
            "image_format", f"{name} is {file_format.name}, which is not read as a picture: {file_format.remedy}"
        )
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
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise RowError(
            "image_corrupt", f"{name} is not a readable image ({len(content)} bytes): none of {formats}"
        ) from None
    except DECODE_FAULTS as error:
        raise RowError("image_corrupt", f"{name} is not a readable image ({len(content)} bytes): {error}") from error
