"""Image files of every kind a hospital sends, and the damaged ones."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmm_ray.data.tables import RowError, error_kind
from medmm_ray.engines.images import decode_image, open_image, read_bytes


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a canvas without holding its pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(p) for p in np.asarray(image).reshape(-1, 3).tolist()]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[bytes], str]:
    def save(content: bytes) -> str:
        path = tmp_path / "image"
        path.write_bytes(content)
        return str(path)

    return save


def test_one_pixel(saved: Callable[[bytes], str]) -> None:
    image = open_image(saved(encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG")))
    assert (image.mode, image.size, pixels(image)) == ("RGB", (1, 1), [(7, 8, 9)])


def test_sixteen_bit_greyscale_is_scaled_not_clipped(saved: Callable[[bytes], str]) -> None:
    values = np.array([[1000, 2000, 3000]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = open_image(saved(encoded(Image.fromarray(values), kind)))
        assert pixels(image) == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_a_burnt_in_marker_does_not_darken_a_sixteen_bit_radiograph() -> None:
    """A film of 0 to 4,095 in 100 x 100 pixels, with a marker of 8 x 8 at the type's maximum, 0.64 % of them."""
    film = np.tile(np.linspace(0, 4095, 100).astype(np.uint16), (100, 1))
    marked = film.copy()
    marked[:8, :8] = 65535
    plain, shown = (
        np.asarray(decode_image(encoded(Image.fromarray(values), "PNG"), "x"))[20:, :, 0].astype(int)
        for values in (film, marked)
    )
    assert plain[0, 50] == 129  # 2,068 between the percentiles 41 and 4,054: 0.505 of 255
    assert np.abs(shown - plain).max() <= 3


def test_a_small_bright_object_on_a_flat_ground_is_seen() -> None:
    values = np.full((100, 100), 900, np.uint16)
    values[50, 50] = 1000
    image = decode_image(encoded(Image.fromarray(values), "PNG"), "x")
    assert (image.getpixel((50, 50)), image.getpixel((0, 0))) == ((255, 255, 255), (0, 0, 0))


def test_flat_sixteen_bit_greyscale_is_black() -> None:
    assert (
        pixels(decode_image(encoded(Image.fromarray(np.full((1, 2), 900, np.uint16)), "PNG"), "x")) == [(0, 0, 0)] * 2
    )


def test_float_greyscale_with_missing_values() -> None:
    values = np.array([[np.nan, -1.0, 1.0]], dtype=np.float32)
    image = decode_image(encoded(Image.fromarray(values), "TIFF"), "x")
    assert pixels(image) == [(0, 0, 0), (0, 0, 0), (255, 255, 255)]


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(decode_image(encoded(image, "PNG"), "x")) == [(10, 20, 30), (200, 100, 50)]


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (1, 2, 3, 255))
    assert pixels(decode_image(encoded(image, "PNG"), "x")) == [(255, 255, 255), (1, 2, 3)]


def test_cmyk() -> None:
    image = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), "x")
    assert image.mode == "RGB"
    assert max(pixels(image)[0]) <= 2


def test_exif_orientation_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=100), "x")
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == (255, 255, 255)
    assert upright.getpixel((4, 13)) == (0, 0, 0)


def jpeg_with_exif(entries: list[bytes], data: bytes = b"") -> bytes:
    """A JPEG of 16 x 8 pixels, white on its left, whose EXIF block has these raw directory entries and this tail."""
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))
    plain = encoded(image, "JPEG", quality=100)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    body = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + data
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]


def short(tag: int, value: int) -> bytes:
    return struct.pack("<HHIHH", tag, 3, 1, value, 0)


TURNED = short(0x0112, 6)
RATIONAL_AT_38 = struct.pack("<HHII", 0x9204, 10, 1, 38)  # an exposure bias, behind the directory


@pytest.mark.parametrize(
    ("content", "upright"),
    [
        (jpeg_with_exif([TURNED, RATIONAL_AT_38], struct.pack("<ii", -1, 0)), True),
        (jpeg_with_exif([TURNED, struct.pack("<HHII", 0x9204, 10, 1, 60_000)]), True),
        (jpeg_with_exif([TURNED, struct.pack("<HHI4s", 0x010E, 2, 4, b"\xff\xfe\xfd\0")]), True),
        (jpeg_with_exif([short(0x0112, 0)]), False),
        (jpeg_with_exif([short(0x0112, 9)]), False),
        (jpeg_with_exif([struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0")]), False),
        (jpeg_with_exif([struct.pack("<HHIHH", 0x0112, 3, 2, 6, 6)]), True),
    ],
    ids=["rational over 0", "value beyond the block", "text that is none", "0", "9", "text", "two values"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL tells of each odd tag
def test_odd_exif_entries_leave_a_sound_picture(content: bytes, upright: bool) -> None:
    image = decode_image(content, "photo.jpg")
    assert image.size == ((8, 16) if upright else (16, 8))
    assert image.getpixel((3, 3)) == (255, 255, 255)
    assert image.getpixel((7, 15) if upright else (15, 7)) == (0, 0, 0)


OTHER_FORMATS = {
    "a DICOM file": b"\0" * 128 + b"DICM\2\0\0\0UL\4\0",
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "an AVIF picture": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "a video": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "a NIfTI volume": b"\x5c\1\0\0" + b"\0" * 340 + b"n+1\0",
    "a JPEG XL picture": b"\xff\x0a\xfa\x1f",
    "a Photoshop file": b"8BPS\0\1\0\0",
    "a PDF file": b"%PDF-1.7\n",
    "a gzip archive": b"\x1f\x8b\x08\0",
    "a zip archive": b"PK\3\4\x14\0",
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "an SVG drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_files_of_other_formats_are_named(name: str) -> None:
    with pytest.raises(RowError, match=f"image_format: scan is {name}, which is not read as a picture: ") as fault:
        decode_image(OTHER_FORMATS[name], "scan")
    assert str(fault.value).partition("a picture: ")[2].strip()


def test_what_is_no_picture_is_said_in_words_that_do_not_change() -> None:
    with pytest.raises(RowError) as fault:
        decode_image(b"not an image", "x")
    assert str(fault.value) == (
        "image_corrupt: x is not a readable image (12 bytes): none of PNG, JPEG, TIFF, BMP, GIF, WEBP, PPM, JPEG2000"
    )


def test_other_filesystems(saved: Callable[[bytes], str]) -> None:
    import fsspec

    content = encoded(Image.new("L", (1, 1), 5), "PNG")
    assert read_bytes(f"file://{saved(content)}") == content
    fsspec.filesystem("memory").pipe("/bucket/a.png", content)
    assert pixels(open_image("memory://bucket/a.png")) == [(5, 5, 5)]


def test_a_gz_name_is_not_decompressed(tmp_path: Path) -> None:
    (tmp_path / "scan.gz").write_bytes(b"raw")
    assert read_bytes(str(tmp_path / "scan.gz")) == b"raw"


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"", "image_empty", "0 bytes"),
        (b"not an image", "image_corrupt", "12 bytes"),
        (png_header(60_000, 60_000), "image_too_large", "60000"),
        (png_header(15_000, 10_000), "image_too_large", "15000 x 10000"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "image_corrupt", "not a readable image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:700], "image_corrupt", "truncated"),
    ],
    ids=["empty", "text", "bomb", "large", "cut_png", "cut_jpeg"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files(saved: Callable[[bytes], str], content: bytes, kind: str, says: str) -> None:
    with pytest.raises(RowError, match=says) as fault:
        open_image(saved(content))
    assert (fault.value.kind, error_kind(str(fault.value))) == (kind, kind)


def test_max_pixels_is_inclusive() -> None:
    content = encoded(Image.new("L", (4, 4)), "PNG")
    assert decode_image(content, "x", max_pixels=16).size == (4, 4)
    with pytest.raises(RowError, match="image_too_large: x is 4 x 4 pixels, more than 15"):
        decode_image(content, "x", max_pixels=15)


def test_missing_files(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "none.png"), str(tmp_path), "nowhere://x/y.png"):
        with pytest.raises(RowError) as fault:
            open_image(uri)
        assert fault.value.kind == "image_missing"


def test_postscript_is_refused() -> None:
    with pytest.raises(RowError, match="image_corrupt"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "x")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL tells of each odd tag
def test_damage_anywhere_is_an_image_or_a_row_error() -> None:
    """Flipped bytes in real files never raise anything but a `RowError`."""
    rng = random.Random(0)
    noise = Image.effect_noise((24, 24), 60)
    originals = [encoded(noise, k) for k in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")]
    outcomes = set()
    for turn in range(400):
        content = bytearray(originals[turn % len(originals)])
        for _ in range(rng.randint(1, 12)):
            content[rng.randrange(min(len(content), 120))] = rng.randrange(256)
        try:
            outcomes.add(decode_image(bytes(content), "x", max_pixels=10_000).mode)
        except RowError as error:
            outcomes.add(error.kind)
    assert outcomes == {"RGB", "image_corrupt", "image_too_large"}
