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

from medmm_ray.engines.images import decode_image, open_image, read_bytes
from medmm_ray.tables import RowError, error_kind


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
