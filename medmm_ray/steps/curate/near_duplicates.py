"""Images that are the same picture in other bytes: *proposed* by perceptual hash, *confirmed* by pixels.

Why confirm: phantoms look alike. Of 499,500 pairs of 1,000 cases, 2,214 are within hash distance 4; the correlation of
their detail is at most 0.953. Copies after JPEG (quality 60), scaling to 60 % or a change of brightness: 0.993 or more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa
from numpy.typing import NDArray
from PIL import ImageFilter

from medmm_ray.data.tables import RowError, TableError
from medmm_ray.engines.images import open_image
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.merging import by_uri

if TYPE_CHECKING:
    from ray.data import Dataset

THUMBNAIL = 32  # pixels a side
_BLUR = 2  # pixels: what is smoother than this is not detail
_BITS = 64  # of a perceptual hash
_BLOCK = 4096  # hashes whose neighbours are looked up at a time
_LONGEST_BAND = 32  # bits
_LARGEST_BANDED = 11  # bits: bands of fewer than ten bits hold too many codes to gain on comparing all
_PAIRS_AT_A_TIME = 2048  # correlated at a time: 16 MB of details


def propose(images: pa.Table, config: CurateConfig) -> tuple[pa.Table, NDArray[np.int64]]:
    """Which images may be the same picture: the rows in question (`image_id`, `uri`) and pairs of their indices [P, 2].

    `images` are raw_images rows; those with an error, and repeats of the same bytes, take no part.
    """
    by_id: dict[str, dict[str, Any]] = {}
    for row in by_uri(images):
        if not row["error"]:
            by_id[row["image_id"]] = row
    rows = list(by_id.values())
    pairs = np.empty((0, 2), np.int64)
    if config.near_duplicates:
        hashes = [row["perceptual_hash"] for row in rows]
        pairs = near_pairs(hashes, config.hash_distance)
    # Most images resemble no other: only those of a pair are opened.
    in_question, place_in_table = np.unique(pairs, return_inverse=True)
    proposed_rows = [rows[index] for index in in_question]
    schema = pa.schema([("image_id", pa.string()), ("uri", pa.string())])
    table = pa.Table.from_pylist(proposed_rows, schema=schema)
    places = place_in_table.reshape(pairs.shape)
    return table, places.astype(np.int64)


def near_pairs(hashes: Sequence[str], distance: int) -> NDArray[np.int64]:
    """All pairs i < j [P, 2] of 64-bit hashes (hexadecimal) that differ in at most `distance` bits, in ascending order.

    A million hashes take less than a minute on two cores, and 0.3 GB.
    """
    values = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    codes_NB = values.view(np.uint8).reshape(-1, _BITS // 8)
    index = _hash_index(distance)
    index.add(codes_NB)
    blocks = [np.empty((0, 2), np.int64)]
    # In blocks: where many pictures look alike, all neighbours at once may be more than memory holds.
    for start in range(0, len(codes_NB), _BLOCK):
        # FAISS searches below a radius.
        limits, _, neighbours = index.range_search(codes_NB[start : start + _BLOCK], distance + 1)
        num_neighbours = np.diff(limits.astype(np.int64))
        hash_numbers = start + np.arange(len(num_neighbours))
        pairs = np.stack([np.repeat(hash_numbers, num_neighbours), neighbours], axis=1)
        # Each pair comes twice, and each hash with itself.
        above = pairs[pairs[:, 0] < pairs[:, 1]]
        blocks.append(above[np.lexsort((above[:, 1], above[:, 0]))])
    return np.concatenate(blocks)


def _hash_index(distance: int) -> Any:
    """FAISS's index of 64-bit codes that finds every one within `distance` bits."""
    import faiss

    if distance > _LARGEST_BANDED:
        return faiss.IndexBinaryFlat(_BITS)
    # Of n disjoint bands one differs in at most one bit where the whole differs in at most 2n - 1: the codes with an
    # equal band, or one that is a bit away, hold all neighbours, so that nothing is missed.
    num_bands = distance // 2 + 1
    index = faiss.IndexBinaryMultiHash(_BITS, num_bands, min(_BITS // num_bands, _LONGEST_BAND))
    index.nflip = 1
    return index


def thumbnails(ds: "Dataset", config: CurateConfig) -> "Dataset":
    """Rows with `image_id` and `uri` to rows with `image_id`, `detail` (float32 bytes) and `error`; one in, one out."""
    return ds.map_batches(
        thumbnail_batch,
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def thumbnail_batch(batch: pa.Table) -> pa.Table:
    """A batch of rows with `image_id` and `uri` as rows of `thumbnails`."""
    rows: list[dict[str, Any]] = []
    for row in batch.to_pylist():
        image_id = row["image_id"]
        try:
            picture = open_image(row["uri"])
            content = detail(picture).tobytes()
        except RowError as error:
            rows.append({"image_id": image_id, "error": str(error)})
        else:
            rows.append({"image_id": image_id, "detail": content})
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("detail", pa.binary()),
            ("error", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def detail(picture: PIL.Image.Image) -> NDArray[np.float32]:
    """The fine structure of a picture: a 32 x 32 greyscale less its blurred self, mean 0, length 1 (or all 0), flat.

    Anatomy that all pictures of a kind share is smooth; what tells two of them apart is not.
    """
    # Greyscale and small: recompression and scaling leave it as it is.
    grey = picture.convert("L")
    small = grey.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BILINEAR)
    blurred = small.filter(ImageFilter.BoxBlur(_BLUR))
    sharp_HW = np.asarray(small, dtype=np.float32)
    smooth_HW = np.asarray(blurred, dtype=np.float32)
    fine_HW = sharp_HW - smooth_HW
    fine = np.asarray(fine_HW - fine_HW.mean(), dtype=np.float32).ravel()
    length = float(np.linalg.norm(fine))
    # A picture of one colour has no detail: it stays 0, and resembles none.
    if length > 0:
        fine = fine / length
    return np.asarray(fine, dtype=np.float32)


def confirm(
    proposed: pa.Table,
    pairs: NDArray[np.int64],
    details: pa.Table,
    config: CurateConfig,
) -> list[tuple[str, str]]:
    """The proposed pairs of image ids whose thumbnails (rows of `thumbnails`, in any order) agree."""
    # Ray returns rows in any order.
    thumbnail_ids = details["image_id"].to_pylist()
    detail_of = dict(zip(thumbnail_ids, details["detail"].to_pylist(), strict=True))
    ids = proposed["image_id"].to_pylist()
    missing_ids = [image_id for image_id in ids if image_id not in detail_of]
    if missing_ids:
        raise TableError(
            f"{len(missing_ids)} of {len(ids)} thumbnails are missing, e.g. {missing_ids[0]}; run curate again"
        )
    # A picture that could not be opened agrees with none: its detail is all 0.
    blank = np.zeros(THUMBNAIL * THUMBNAIL, np.float32).tobytes()
    content = b"".join(detail_of[image_id] or blank for image_id in ids)
    details_ND = np.frombuffer(content, np.float32).reshape(len(ids), THUMBNAIL**2)
    confirmed: list[tuple[str, str]] = []
    # In chunks: the details of all pairs at once may be more than memory holds.
    num_chunks = max(1, len(pairs) // _PAIRS_AT_A_TIME)
    for chunk in np.array_split(pairs, num_chunks):
        first_PD = details_ND[chunk[:, 0]]
        second_PD = details_ND[chunk[:, 1]]
        correlation = np.einsum("pd,pd->p", first_PD, second_PD)
        alike = chunk[correlation >= config.pixel_correlation]
        for i, j in alike.tolist():
            confirmed.append((ids[i], ids[j]))
    return confirmed
