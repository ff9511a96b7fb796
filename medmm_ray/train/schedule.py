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
    # By a string: random.Random takes its hash over all bits, so neighbouring seeds give unlike orders.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    batches: list[list[int]] = []
    num_samples = 0
    for unit in order:
        if not batches or num_samples >= batch_size:
            batches.append([])
            num_samples = 0
        batches[-1].append(unit)
        num_samples += sizes[unit]
    return batches


def micro_batches(units: Sequence[int], costs: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """One update's units in micro-batches that cost at most `budget`; a unit above it goes alone.

    With `padded`, units of like cost stand together, and a micro-batch costs its longest unit times their number.
    """
    order = sorted(units, key=lambda unit: (costs[unit], unit)) if padded else units
    batches: list[list[int]] = []
    longest = total = 0
    for unit in order:
        cost = costs[unit]
        longest = max(longest, cost)
        total += cost
        num_units = len(batches[-1]) + 1 if batches else 1
        batch_cost = longest * num_units if padded else total
        # The first of a micro-batch is taken whatever it costs: a unit is never split.
        if not batches or batch_cost > budget:
            batches.append([])
            longest = total = cost
        batches[-1].append(unit)
    return batches


def learning_rate_factor(update: int, num_updates: int, warmup: float) -> float:
    """What the learning rate is multiplied by at an update counted from 0: a linear rise, then a half cosine to 0."""
    num_warmup = max(1, round(warmup * num_updates))
    if update < num_warmup:
        return (update + 1) / num_warmup
    progress = min(1.0, (update - num_warmup) / max(1, num_updates - num_warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def validation_ids(ids: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A `fraction` of the distinct ids, to be held out for validation: at least one unless it is 0, never all."""
    # By distinct id: all units of a question are on one side.
    distinct = sorted(set(ids))
    number = 0
    if fraction > 0:
        number = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    return set(random.Random(f"held out/{seed}").sample(distinct, max(0, number)))
