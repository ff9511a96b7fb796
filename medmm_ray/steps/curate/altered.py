"""Images that are one picture, altered: cropped, with a border, turned by some degrees, inverted, recompressed.

*Proposed* by a descriptor of edges (FAISS), *confirmed* by alignment (OpenCV's ECC) and the correlation of what is fine
in both. Each picture has two views, whole and without its plain margins: a border is found in one, a crop in the other.

Of VQA-RAD's pictures, 120 altered copies correlate by .94 or more with their originals; 500 of the pairs of different
pictures that are proposed, those that an earlier measure took for one among them, by .72 at most.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa
from numpy.typing import NDArray

from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.merging import by_uri

if TYPE_CHECKING:
    from ray.data import Dataset

VIEW = 96  # pixels a side
CELLS = 16  # of a descriptor, a side
NEIGHBOURS = 5
"""Images that are compared with each at most: those with the nearest descriptors."""
LEAST_SIMILARITY = 0.7
"""Cosine of two descriptors below which images are not compared."""
_FLAT = 50_000
"""Descriptors up to which all are compared; of more, lists of like ones."""
_MARGIN = 4.0
"""Standard deviation of a row or column of grey values below which it is margin."""
_STRETCH, _SHIFT = 0.3, 0.2
"""An alignment that changes the area by more, or moves by more of the width, is no alteration but a coincidence."""
_FINE = 4.0
"""Pixels: what is smoother is shared by all pictures of one anatomy."""
_NOISE = 4.0
"""Variance of grey values below which a place is noise, and not brought to the contrast of others."""


# Descriptors


def describe(ds: "Dataset", config: CurateConfig) -> "Dataset":
    """Rows with `image_id` and `uri` to rows with `image_id` and `descriptors` (float32 bytes, one or two); one in, one
    out."""
    return ds.map_batches(
        describe_batch,
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def describe_batch(batch: pa.Table) -> pa.Table:
    """A batch of rows with `image_id` and `uri` as rows of `describe`; of what cannot be opened there are none."""
    contents: list[bytes] = []
    for uri in batch["uri"].to_pylist():
        try:
            of_picture = [descriptor(view) for view in views(open_image(uri))]
        except RowError:
            of_picture = []
        contents.append(b"".join(one_view.tobytes() for one_view in of_picture))
    return pa.table({"image_id": batch["image_id"], "descriptors": pa.array(contents, pa.large_binary())})


def views(picture: PIL.Image.Image) -> list[NDArray[np.float32]]:
    """The grey picture [VIEW, VIEW], and, where it has plain margins, what lies within them."""
    import cv2

    whole = np.asarray(picture.convert("L"), np.float32)
    rows, columns = _content(whole.std(axis=1)), _content(whole.std(axis=0))
    within = whole[rows, columns]
    parts = [whole]
    # What is left of an almost empty picture is no picture.
    if within.shape != whole.shape and min(within.shape) >= CELLS:
        parts.append(within)
    return [cv2.resize(part, (VIEW, VIEW), interpolation=cv2.INTER_AREA) for part in parts]


def _content(deviations: NDArray[np.float32]) -> slice:
    places = np.flatnonzero(deviations > _MARGIN)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, len(deviations))


def descriptor(view: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where a view has edges [CELLS * CELLS], mean 0, length 1: equal for an inverted picture, near for a moved one."""
    import cv2

    across = cv2.Sobel(view, cv2.CV_32F, 1, 0, ksize=3)
    down = cv2.Sobel(view, cv2.CV_32F, 0, 1, ksize=3)
    # The root, so that one bright edge does not outweigh all others.
    edges = np.sqrt(np.hypot(across, down))
    smooth = cv2.GaussianBlur(edges, (0, 0), 7)
    cells = cv2.resize(smooth, (CELLS, CELLS), interpolation=cv2.INTER_AREA).ravel()
    centred = cells - cells.mean()
    length = float(np.linalg.norm(centred))
    return np.asarray(centred / length if length > 0 else centred, np.float32)


# Proposing


def to_describe(images: pa.Table) -> pa.Table:
    """The images that are described: `image_id` and `uri` of those without an error, each content once."""
    uris: dict[str, str] = {}
    for row in by_uri(images):
        if not row["error"]:
            uris.setdefault(row["image_id"], row["uri"])
    return pa.table({"image_id": list(uris), "uri": list(uris.values())})


def propose_altered(images: pa.Table, described: pa.Table) -> pa.Table:
    """Pairs of images that may be one, altered: `first`, `second` (ids) and their URIs, each pair once, in order.

    `images` are rows of `to_describe`, `described` those of `describe`, in any order.
    """
    uri_of = dict(zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True))
    owners: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for row in described.sort_by("image_id").to_pylist():
        of_picture = np.frombuffer(row["descriptors"] or b"", np.float32).reshape(-1, CELLS * CELLS)
        owners += [row["image_id"]] * len(of_picture)
        parts.append(of_picture)
    pairs: set[tuple[str, str]] = set()
    if len(owners) > 1:
        descriptors = np.concatenate(parts)
        # An image is its own nearest, in both views.
        similarities, places = _index(descriptors).search(descriptors, min(len(owners), 2 * NEIGHBOURS + 2))
        for owner, row_similarities, row_places in zip(owners, similarities, places, strict=True):
            pairs.update(_pairs_of(owner, owners, row_similarities, row_places))
    ordered = sorted(pairs)
    columns = {
        "first": [first for first, _ in ordered],
        "second": [second for _, second in ordered],
        "first_uri": [uri_of[first] for first, _ in ordered],
        "second_uri": [uri_of[second] for _, second in ordered],
    }
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def _pairs_of(
    owner: str,
    owners: Sequence[str],
    similarities: NDArray[np.float32],
    places: NDArray[np.int64],
) -> set[tuple[str, str]]:
    """The pairs of an image with its nearest others."""
    nearest: dict[str, None] = {}
    for similarity, place in zip(similarities.tolist(), places.tolist(), strict=True):
        if place >= 0 and similarity >= LEAST_SIMILARITY and owners[place] != owner:
            nearest.setdefault(owners[place])
    return {(min(owner, other_id), max(owner, other_id)) for other_id in itertools.islice(nearest, NEIGHBOURS)}


def _index(descriptors: NDArray[np.float32]) -> Any:
    """FAISS's index of descriptors, by inner product."""
    import faiss

    width = descriptors.shape[1]
    if len(descriptors) <= _FLAT:
        index: Any = faiss.IndexFlatIP(width)
    else:
        index = faiss.index_factory(width, f"IVF{int(4 * len(descriptors) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(descriptors[:: max(1, len(descriptors) // 200_000)])
        index.nprobe = 16
    index.add(descriptors)
    return index


# Confirming


def compare(ds: "Dataset", config: CurateConfig) -> "Dataset":
    """Rows of `propose_altered` to rows with `first`, `second` and `correlation`; one in, one out."""
    return ds.map_batches(
        compare_batch,
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def compare_batch(batch: pa.Table) -> pa.Table:
    """A batch of rows of `propose_altered` as rows of `compare`; 0 where one cannot be opened."""
    correlations = []
    for row in batch.to_pylist():
        try:
            first, second = views(open_image(row["first_uri"])), views(open_image(row["second_uri"]))
            correlations.append(aligned_correlation(first, second))
        except RowError:
            correlations.append(0.0)
    return pa.table({"first": batch["first"], "second": batch["second"], "correlation": correlations})


def confirmed(compared: pa.Table, config: CurateConfig) -> list[tuple[str, str]]:
    """The pairs of image ids that are one picture, in order."""
    pairs = []
    for row in compared.to_pylist():
        if row["correlation"] >= config.aligned_correlation:
            pairs.append((row["first"], row["second"]))
    return sorted(pairs)


def aligned_correlation(first: Sequence[NDArray[np.float32]], second: Sequence[NDArray[np.float32]]) -> float:
    """The best correlation of the fine structure of two pictures' views once they are aligned, inverted or not."""
    candidates = []
    for one_view, other_view in itertools.product(first, second):
        similarity = float(descriptor(one_view) @ descriptor(other_view))
        candidates.append((similarity, one_view, other_view))
    # The two most alike pairs of views: the others do not show the same part.
    candidates.sort(key=lambda candidate: -candidate[0])
    best = 0.0
    for _, one_view, other_view in candidates[:2]:
        for version in (other_view, 255 - other_view):
            best = max(best, _correlation(one_view, version))
    return best


def _correlation(one_view: NDArray[np.float32], other_view: NDArray[np.float32]) -> float:
    """The correlation of two views' fine structure, the second moved onto the first; 0 where that cannot be done."""
    import cv2

    cv2.setNumThreads(1)
    blurred = [cv2.GaussianBlur(view, (0, 0), 1) for view in (one_view, other_view)]
    warp = _alignment(blurred[0], blurred[1])
    if warp is None:
        return 0.0
    flags = cv2.INTER_LINEAR + cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(blurred[1], warp, (VIEW, VIEW), flags=flags)
    is_shared = cv2.warpAffine(np.ones_like(moved), warp, (VIEW, VIEW), flags=flags) > 0.99
    fine_first = _fine_structure(blurred[0])[is_shared]
    fine_second = _fine_structure(moved)[is_shared]
    if len(fine_first) < VIEW * VIEW // 2:
        return 0.0
    fine_first, fine_second = fine_first - fine_first.mean(), fine_second - fine_second.mean()
    lengths = float(np.linalg.norm(fine_first) * np.linalg.norm(fine_second))
    return float(fine_first @ fine_second) / lengths if lengths > 0 else 0.0


def _fine_structure(view: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is fine in a view, by its contrast at each place: else a skull's bright ring outweighs all within it."""
    import cv2

    fine = view - cv2.GaussianBlur(view, (0, 0), _FINE)
    variance = cv2.GaussianBlur(fine * fine, (0, 0), _FINE)
    return np.asarray(fine / np.sqrt(variance + _NOISE), np.float32)


def _alignment(one_view: NDArray[np.float32], other_view: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The affine map [2, 3] of the second view onto the first, found at half the size first; None without one."""
    import cv2

    warp = np.eye(2, 3, dtype=np.float32)
    for size, iterations, blur in ((VIEW // 2, 60, 9), (VIEW, 30, 5)):
        small = [cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA) for view in (one_view, other_view)]
        criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, iterations, 1e-5)
        try:
            _, warp = cv2.findTransformECC(small[0], small[1], warp, cv2.MOTION_AFFINE, criteria, None, blur)
        except cv2.error:
            # It does not converge for pictures that have nothing in common.
            return None
        if size < VIEW:
            warp[:, 2] *= 2
    stretch = abs(float(np.linalg.det(warp[:, :2])) - 1)
    shift = float(np.abs(warp[:, 2]).max()) / VIEW
    return warp if stretch <= _STRETCH and shift <= _SHIFT else None
