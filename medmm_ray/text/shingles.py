"""Texts as sets of hashed shingles: runs of three words, spelling and punctuation aside.

The hash is CRC-32, mixed: fast, and the same on every machine and in every version, so that hashes may be shipped.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from medmm_ray.text.matching import normalise

SHINGLE_WORDS = 3
_WORD = re.compile(r"[^\W_]+")
_MIX = np.uint32(0x9E3779B1)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(normalise(text).lower())


def shingles(words: list[str]) -> list[str]:
    """The runs of three words, each as often as it occurs; of a shorter text the whole.

    >>> shingles(["a", "b", "c", "d"])
    ['a b c', 'b c d']
    """
    # A text of two words is one shingle.
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)] if words else []


def shingle_hashes(text: str) -> NDArray[np.uint32]:
    """The hashes of a text's shingles, sorted, each once."""
    return hashes_of(shingles(words_of(text)))


def hashes_of(texts: Iterable[str]) -> NDArray[np.uint32]:
    """The hashes of texts, sorted, each once."""
    codes = np.fromiter((zlib.crc32(text.encode()) for text in texts), dtype=np.uint32)
    # CRC-32 of like texts is alike: mixed, the lowest hashes are a fair sample of them.
    mixed = (codes ^ (codes >> np.uint32(15))) * _MIX
    return np.unique(mixed ^ (mixed >> np.uint32(13)))
