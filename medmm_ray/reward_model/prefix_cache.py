"""Keys and values of prefixes, kept between requests: a case's documents are read once, however many requests ask.

Enters: a prefix's token ids with its keys and values. Leaves: for another prefix the longest beginning that is known.
Entries are found by hashes of their blocks of `BLOCK` tokens, each hash covering all tokens before it, and then
compared token by token; so a question with other solutions, other options or another last document shares what it can.
The cache holds at most so many bytes, and drops what was used least recently. Several threads may use it.

Legend: P prefix length, D text width.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medmm_ray.reward_model.forward import CachedPrefix
from medmm_ray.reward_model.full_sequence import common_prefix

BLOCK = 64  # tokens; shorter beginnings cost less to compute than to look up


@dataclass
class CacheStatistics:
    """Tokens of prefixes that were looked up, how many of them were known, prefixes that were dropped, bytes held."""

    num_tokens: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    num_bytes: int = 0


class PrefixIds:
    """A prefix's token ids with the hashes of its blocks; computed once, looked up often.

    `salt` stands for what the ids do not show, such as the content of images: a prefix of another salt is another.
    """

    def __init__(self, ids: Sequence[int], salt: str = "") -> None:
        self.ids = list(ids)
        running = hashlib.sha256(salt.encode())
        self.block_keys: list[bytes] = []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            running.update(array("q", self.ids[start : start + BLOCK]).tobytes())
            self.block_keys.append(running.digest())

    def num_common(self, other: "PrefixIds", num_blocks: int) -> int:
        """Tokens that both begin with, of which so many blocks are known to be equal."""
        # Hashes stand for the blocks: to compare thousands of ids at each look would take longer than a pass.
        start = num_blocks * BLOCK
        return start + common_prefix([self.ids[start:], other.ids[start:]])


@dataclass(frozen=True)
class _Entry:
    prefix_ids: PrefixIds
    prefix: CachedPrefix
    num_bytes: int


class PrefixCache:
    """At most `max_bytes` of prefixes; with 0 nothing is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.statistics = CacheStatistics()
        self._lock = threading.Lock()
        # Requests are looked up on the threads that tokenize them, and extended on the one that scores.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # by the last block's key, least recently used first
        self._entry_of_block: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def known_length(self, prefix_ids: PrefixIds) -> int:
        """How many of the first tokens are known now; no use of the entry."""
        with self._lock:
            _, length = self._find(prefix_ids)
            return length

    def longest(self, prefix_ids: PrefixIds) -> tuple[int, CachedPrefix]:
        """How many of the first tokens are known, and a prefix of exactly these, for the caller to extend."""
        with self._lock:
            self.statistics.num_tokens += len(prefix_ids.ids)
            name, length = self._find(prefix_ids)
            if name is None:
                return 0, CachedPrefix()
            self._entries.move_to_end(name)
            self.statistics.num_hit_tokens += length
            return length, _beginning(self._entries[name].prefix, length)

    def _find(self, prefix_ids: PrefixIds) -> tuple[bytes | None, int]:
        """The entry that shares most blocks, and how many tokens it shares."""
        # From the longest: the first that is known is the best.
        for num_blocks in range(len(prefix_ids.block_keys), 0, -1):
            name = self._entry_of_block.get(prefix_ids.block_keys[num_blocks - 1])
            if name is not None:
                return name, self._entries[name].prefix_ids.num_common(prefix_ids, num_blocks)
        return None, 0

    def add(self, prefix_ids: PrefixIds, prefix: CachedPrefix) -> None:
        """Keep a computed prefix, in the place of its own beginnings."""
        num_bytes = _num_bytes(prefix)
        if not prefix_ids.block_keys or num_bytes > self.max_bytes:
            return
        whole = CachedPrefix(dict(prefix.layers), [torch.cat(prefix.middle_PD)])
        name = prefix_ids.block_keys[-1]
        # A case that came in parts at once may have been computed by several of them.
        with self._lock:
            holder = self._entry_of_block.get(name)
            if holder is not None and len(self._entries[holder].prefix_ids.ids) >= len(prefix_ids.ids):
                return
            # What an entry begins with is found through it: twice in memory would be once too often.
            self._drop_beginnings(prefix_ids)
            self._entries[name] = _Entry(prefix_ids, whole, num_bytes)
            self.num_bytes += num_bytes
            for key in prefix_ids.block_keys:
                self._entry_of_block[key] = name
            while self.num_bytes > self.max_bytes:
                self.statistics.num_evictions += 1
                self._drop(next(iter(self._entries)))

    def _drop_beginnings(self, prefix_ids: PrefixIds) -> None:
        """Drop the entries that are beginnings of a prefix, and the one whose place it takes."""
        for num_blocks, key in enumerate(prefix_ids.block_keys, 1):
            shorter = self._entries.get(key)
            if shorter is None:
                continue
            is_beginning = shorter.prefix_ids.num_common(prefix_ids, num_blocks) == len(shorter.prefix_ids.ids)
            if is_beginning or num_blocks == len(prefix_ids.block_keys):
                self._drop(key)

    def _drop(self, name: bytes) -> None:
        entry = self._entries.pop(name)
        self.num_bytes -= entry.num_bytes
        for key in entry.prefix_ids.block_keys:
            if self._entry_of_block.get(key) == name:
                del self._entry_of_block[key]


def _beginning(prefix: CachedPrefix, length: int) -> CachedPrefix:
    """Views of a prefix's first `length` tokens: what is appended to them goes to new tensors."""
    # Slices share the entry's memory, and leave it as it is.
    layers = {}
    for layer, (keys, values) in prefix.layers.items():
        layers[layer] = (keys[:, :, :length], values[:, :, :length])
    return CachedPrefix(layers, [torch.cat(prefix.middle_PD)[:length]])


def _num_bytes(prefix: CachedPrefix) -> int:
    tensors = list(prefix.middle_PD)
    for keys_and_values in prefix.layers.values():
        tensors += keys_and_values
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
