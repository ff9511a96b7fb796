"""Which samples an update sees, and how big its step is: pure functions of the seed, whatever the number of workers.

A *unit* is what is never split: a worked solution, or one question with all its labelled solutions. It holds `sizes[u]`
samples, and costs `costs[u]` tokens (or pictures). Batches are counted in samples over all workers.
"""

import math
import random
from collections.abc import Sequence


def epoch_batches(sizes: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The units of each update of an epoch: shuffled by (seed, epoch), then cut where a batch has its samples.

    Every unit with samples is seen once. The last batch may be smaller: its loss is a mean all the same.
    """
    order = [unit for unit, size in enumerate(sizes) if size > 0]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    batches: list[list[int]] = []
    samples = 0
    for unit in order:
        if not batches or samples >= batch_size:
            batches.append([])
            samples = 0
        batches[-1].append(unit)
        samples += sizes[unit]
    return batches


def micro_batches(units: Sequence[int], costs: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """One update's units in groups that fit `budget`; a unit above it goes alone.

    With `padded`, units of like cost stand together, and a group costs its longest unit times its number.
    """
    groups: list[list[int]] = []
    longest = total = 0
    for unit in sorted(units, key=lambda u: (costs[u], u)) if padded else units:
        cost = costs[unit]
        longest, total = max(longest, cost), total + cost
        if not groups or (longest * (len(groups[-1]) + 1) if padded else total) > budget:
            groups.append([])
            longest = total = cost
        groups[-1].append(unit)
    return groups


def learning_rate_factor(update: int, num_updates: int, warmup: float) -> float:
    """What the learning rate is multiplied by at an update counted from 0: a linear rise, then a half cosine to 0."""
    rise = max(1, round(warmup * num_updates))
    if update < rise:
        return (update + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rise) / max(1, num_updates - rise))))


def held_out(ids: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A `fraction` of the distinct ids, at least one unless it is 0, for validation."""
    distinct = sorted(set(ids))
    number = min(len(distinct) - 1, max(1, round(fraction * len(distinct)))) if fraction > 0 else 0
    return set(random.Random(f"held out/{seed}").sample(distinct, max(0, number)))
