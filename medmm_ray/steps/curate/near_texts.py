"""Questions that say the same in near words: *proposed* by MinHash (rensa), *confirmed* by the words themselves.

Questions on pictures take no part, of which the same words are no repeat: "Is there a fracture?" is asked of many.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medmm_ray.text.shingles import shingle_hashes

NUM_PERMUTATIONS = 64
NUM_BANDS = 32
"""Bands of two hashes each: texts that share half of their shingles are proposed with 99.99 %, a fifth with 73 %."""
SEED = 1
_AT_A_TIME = 100_000
_ESTIMATE_ERROR = 0.25
"""Of 64 hashes the estimate's standard error is at most 1/16: four of them."""
_REACH = 16
"""Texts with an equal band are compared with so many of the next ones: a chain joins more of one kind all the same."""


def near_texts(texts: Sequence[str], similarity: float) -> NDArray[np.int64]:
    """All pairs i < j [P, 2] of texts with a Jaccard similarity of shingles of `similarity` or more, in order."""
    hashes = list(map(shingle_hashes, texts))
    digests = _digests(hashes)
    pairs = _proposed(digests)
    estimates = _estimates(digests, pairs)
    # What MinHash already tells apart need not be compared word by word.
    likely = pairs[estimates >= similarity - _ESTIMATE_ERROR]
    is_near = [_jaccard(hashes[first], hashes[second]) >= similarity for first, second in likely.tolist()]
    near: NDArray[np.int64] = likely[np.array(is_near, bool)]
    return near


def _digests(hashes: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """The MinHash digests [N, NUM_PERMUTATIONS] of sets of shingles; a text without words has the largest values."""
    from rensa import RMinHash

    parts = [np.empty((0, NUM_PERMUTATIONS), np.uint32)]
    for start in range(0, len(hashes), _AT_A_TIME):
        chunk = hashes[start : start + _AT_A_TIME]
        # One flat buffer and its rows' ends: no Python object for a shingle.
        offsets = np.cumsum([0, *map(len, chunk)], dtype=np.uint64)
        flat = np.concatenate(chunk).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            flat,
            offsets,
            NUM_PERMUTATIONS,
            SEED,
        )
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(chunk), NUM_PERMUTATIONS))
    return np.concatenate(parts)


def _proposed(digests: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Pairs whose digests agree in a whole band, each once."""
    width = NUM_PERMUTATIONS // NUM_BANDS
    assert width == 2, "a band is one 64-bit number"
    bands = np.ascontiguousarray(digests).view(np.uint64)
    # Texts without words agree in all bands, and in nothing else.
    empty = np.all(digests == np.uint32(0xFFFFFFFF), axis=1)
    codes = [np.empty(0, np.int64)]
    number = len(digests)
    for band in range(NUM_BANDS):
        for first, second in _buckets(bands[:, band], empty):
            codes.append(first * number + second)
        # Merged band by band: a repeat is proposed by many of them.
        codes = [np.unique(np.concatenate(codes))]
    return np.stack([codes[0] // max(number, 1), codes[0] % max(number, 1)], axis=1)


def _buckets(
    values: NDArray[np.uint64], empty: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of places with equal values, first below second: those at most `_REACH` apart in their bucket."""
    order = np.argsort(values, kind="stable")
    order = order[~empty[order]]
    ordered = values[order]
    distance = 1
    while distance < min(len(order), _REACH + 1):
        equal = ordered[distance:] == ordered[:-distance]
        if not equal.any():
            return
        yield order[:-distance][equal], order[distance:][equal]
        distance += 1


def _estimates(digests: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of equal hashes of each pair's digests [P], an estimate of their similarity."""
    estimates = np.empty(len(pairs))
    for start in range(0, len(pairs), _AT_A_TIME):
        part = pairs[start : start + _AT_A_TIME]
        equal = digests[part[:, 0]] == digests[part[:, 1]]
        estimates[start : start + _AT_A_TIME] = equal.mean(axis=1)
    return estimates


def _jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(1, len(first) + len(second) - common)
