"""Near duplicates among perceptual hashes: FAISS's banded index beside comparing all pairs, and a million hashes alone.

Hashes as pictures have them: half are drawn freely, half lie around centres (pictures of one kind look alike), and a
tenth are copies of others with up to `distance` bits changed. Both ways must give the same pairs.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.timing import peak_bytes, timed
from medmm_ray.config import Config
from medmm_ray.steps.curate.near_duplicates import near_pairs

BITS = 64
NUM_CENTRES = 1000
FLIPPED_AROUND_CENTRE = 0.15  # chance of a bit to differ from the centre's
SECONDS, GIB = 120.0, 2.0  # what a million hashes may take
BLOCK = 2048  # hashes compared at a time: 2048 x 2048 distances are 4 MB

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]


class BenchConfig(Config):
    """How many hashes, and how near."""

    hashes: int = Field(1_000_000, ge=1)
    """Hashes that are searched through the index alone."""
    compared: int = Field(30_000, ge=1)
    """Hashes on which both ways are measured: comparing all pairs grows with their square."""
    distance: int = Field(4, ge=0, le=BITS)
    """Largest Hamming distance of a pair."""
    repeats: int = Field(3, ge=1)
    """Runs of the smaller set; the median counts."""
    seed: int = 0
    """Start of all random numbers."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The gain over comparing all pairs; then seconds and memory of the larger set, of what they may be."""
    few = draw_hashes(config.compared, config.distance, config.seed)
    few_texts = as_texts(few)
    baseline_s, expected = timed(lambda: compare_all(few, config.distance), config.repeats, "cpu")
    seconds, pairs = timed(lambda: near_pairs(few_texts, config.distance), config.repeats, "cpu")
    if not np.array_equal(pairs, expected):
        raise AssertionError(
            f"the index gives {len(pairs):,} pairs, comparing all {len(expected):,}; seed {config.seed}"
        )
    console.print(f"[dim]{config.compared:,} hashes: {len(pairs):,} pairs, the same both ways[/dim]")
    name = f"{config.compared:,} hashes, distance {config.distance}: gain over comparing all"
    yield Measured(name, baseline_s, seconds, baseline_s / seconds, "≥ 3", "s")
    texts = as_texts(draw_hashes(config.hashes, config.distance, config.seed))
    seconds = 0.0

    def search() -> None:
        nonlocal seconds
        seconds, pairs = timed(lambda: near_pairs(texts, config.distance), 1, "cpu")
        console.print(f"[dim]{config.hashes:,} hashes: {len(pairs):,} pairs[/dim]")

    gib = peak_bytes(search, "cpu") / 2**30
    name = f"{config.hashes:,} hashes, distance {config.distance}"
    yield Measured(f"{name}: time", SECONDS, seconds, seconds / SECONDS, "≤ 1", "s")
    yield Measured(f"{name}: memory", GIB, gib, gib / GIB, "≤ 1", "GiB")


def draw_hashes(num: int, distance: int, seed: int) -> Hashes:
    """`num` hashes as the module says."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**BITS, num, dtype=np.uint64, endpoint=False)
    centres = rng.integers(0, 2**BITS, NUM_CENTRES, dtype=np.uint64, endpoint=False)
    around = centres[rng.integers(0, NUM_CENTRES, num // 2)]
    for bit in range(BITS):
        is_flipped = rng.random(len(around)) < FLIPPED_AROUND_CENTRE
        around ^= is_flipped.astype(np.uint64) << np.uint64(bit)
    hashes[: len(around)] = around
    num_copies = num // 10
    copies, originals = rng.integers(0, num, num_copies), rng.integers(0, num, num_copies)
    changed = np.zeros(num_copies, dtype=np.uint64)
    for _ in range(distance):
        bits = rng.integers(0, BITS, num_copies).astype(np.uint64)
        # A bit that is drawn twice changes back: copies differ in 0 to `distance` bits.
        changed ^= np.uint64(1) << bits
    hashes[copies] = hashes[originals] ^ changed
    return hashes


def as_texts(hashes: Hashes) -> list[str]:
    """Hashes as the table of images has them, hexadecimal."""
    return [f"{value:016x}" for value in hashes.tolist()]


def compare_all(hashes: Hashes, distance: int) -> Pairs:
    """All pairs i < j [P, 2] within `distance` bits, in ascending order, by comparing every one."""
    blocks = [np.empty((0, 2), np.int64)]
    for top in range(0, len(hashes), BLOCK):
        rows = hashes[top : top + BLOCK, None]
        # Blocks left of the diagonal hold the same pairs the other way round.
        for start in range(top, len(hashes), BLOCK):
            distances = np.bitwise_count(rows ^ hashes[None, start : start + BLOCK])
            i, j = np.nonzero(distances <= distance)
            pairs = np.stack([i + top, j + start], axis=1)
            # On the diagonal each pair comes twice, and each hash with itself.
            blocks.append(pairs[pairs[:, 0] < pairs[:, 1]])
    all_pairs = np.concatenate(blocks)
    order = np.lexsort((all_pairs[:, 1], all_pairs[:, 0]))
    in_order: Pairs = all_pairs[order]
    return in_order
