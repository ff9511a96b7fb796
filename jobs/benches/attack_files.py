"""Files that an image field may be given: broken, huge in their header, of odd kinds, or no image at all."""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from random import Random

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")


def files(seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents."""
    yield from _damaged(Random(seed))
    yield from _odd_kinds()
    yield from _bombs()
    yield from _dicom()
    yield from _no_images()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file."""
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _picture() -> Image.Image:
    return Image.effect_noise((96, 80), 60).convert("RGB")


def _damaged(rng: Random) -> Iterator[tuple[str, bytes]]:
    """Of each format: cut at several places, with bits turned over, and with another's beginning."""
    for kind in FORMATS:
        whole = encoded(_picture(), kind)
        for share in (0.02, 0.5, 0.98):
            yield f"{kind} cut at {share:.0%}", whole[: int(len(whole) * share)]
        for number in range(3):
            broken = bytearray(whole)
            for _ in range(1 + len(broken) // 200):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            yield f"{kind} with bits turned over, {number}", bytes(broken)
        yield f"{kind} that begins as another", b"\x89PNG\r\n\x1a\n" + whole[8:]
        yield f"{kind} with much behind it", whole + b"\0" * 200_000


def _odd_kinds() -> Iterator[tuple[str, bytes]]:
    ramp = np.linspace(0, 60_000, 64 * 48).reshape(48, 64)
    yield "16-bit PNG", encoded(Image.fromarray(ramp.astype(np.uint16)), "PNG")
    yield "float TIFF", encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF")
    with_nan = ramp.astype(np.float32)
    with_nan[::2] = np.nan
    yield "TIFF of NaN", encoded(Image.fromarray(with_nan), "TIFF")
    yield "palette", encoded(_picture().quantize(7), "PNG")
    yield "palette, transparent", encoded(_picture().quantize(7), "PNG", transparency=0)
    yield "one bit", encoded(_picture().convert("1"), "PNG")
    yield "CMYK", encoded(_picture().convert("CMYK"), "JPEG")
    yield "LA", encoded(_picture().convert("LA"), "PNG")
    yield "one pixel", encoded(Image.new("RGB", (1, 1)), "PNG")
    yield "one row", encoded(Image.new("RGB", (60_000, 1)), "PNG")
    frames = [Image.new("RGB", (64, 64), (number % 256, 0, 0)) for number in range(300)]
    yield "300 frames", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "animated PNG", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:20])
    yield "TIFF of pages", encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:20])


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that say that they are large, and some that are."""
    for width, height in ((1 << 31, 1), (100_000, 100_000), (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (40_000, 1_001)):
        yield f"PNG whose header says {width} x {height}", _png(width, height, b"\0" * 100)
    yield "PNG of 6,000 x 6,000 zeros", _png(6000, 6000, b"\0" * (6000 * 18_001))
    yield "PNG with less than its header says", _png(5000, 5000, b"\0" * 1000)
    text = b"x\0\0" + zlib.compress(b"a" * 20_000_000, 1)
    plain = _png(8, 8, b"\0" * 200)
    yield "PNG with a text of 20 MB", plain[:33] + _chunk(b"zTXt", text) + plain[33:]
    yield "GIF whose header says 65,535 x 65,535", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0;"
    yield (
        "BMP whose header says 2^31",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 90, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, *[0] * 6),
    )
    loop = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 3, 1, 64, 8)
    yield "TIFF whose directory leads to itself", loop


def _png(width: int, height: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(pixels, 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _dicom() -> Iterator[tuple[str, bytes]]:
    """Films as a scanner writes them, whole, cut, and with sizes that are not there."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    def film(rows: int, pixels: bytes) -> bytes:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid(entropy_srcs=["film"])
        dataset.Rows = dataset.Columns = rows
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.PixelData = pixels
        sink = io.BytesIO()
        dataset.save_as(sink, enforce_file_format=True)
        return sink.getvalue()

    whole = film(32, b"\1\2" * 1024)
    yield "DICOM", whole
    yield "DICOM, cut", whole[:200]
    yield "DICOM without its preamble", whole[128:]
    yield "DICOM without its first bytes", whole[132:]
    yield "DICOM whose rows are not there", film(65_535, b"\1\2" * 64)
    yield "DICOM's mark alone", b"\0" * 128 + b"DICM"
    yield "DICOM behind a PNG's beginning", b"\x89PNG\r\n\x1a\n" + whole[8:]


def _no_images() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "one byte", b"\x89"
    yield "gzip of 20 MB", gzip.compress(b"\0" * 20_000_000, 1)
    yield (
        "SVG with an entity",
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>',
    )
    yield "HTML", b"<html><script>alert(1)</script></html>"
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n"
    yield "ZIP", b"PK\3\4" + b"\0" * 100
    yield "NIfTI", b"\0" * 344 + b"n+1\0"
    yield "SGI", struct.pack(">HBBHHHH", 474, 1, 1, 3, 60_000, 60_000, 3) + b"\0" * 512
    yield "noise", Random(5).randbytes(5000)
