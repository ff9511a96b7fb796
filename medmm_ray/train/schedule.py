"""Which samples an update takes, how its work is dealt to workers, and how big its step is.

All of it is a pure function of the seed and of what the samples cost. A *unit* is what shares a prefix: a question's
solutions, or a lone sample. An update takes `Part`s of units; its parts do not depend on the number of workers, so any
number of them trains the same. Each worker is then dealt passes of like cost. A part may be split over passes, so that
each reads the prefix: where that costs more than it evens out, the part stays whole.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BISECTIONS = 12  # of the highest cost of a pass: to a few thousandths


class Part(NamedTuple):
    """Some solutions of a unit, by their places in it."""

    unit: int
    solutions: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """What there is to train on: the solutions of unit u are the entries ``starts[u]`` to ``starts[u + 1]``.

    `samples` is how many solutions an entry stands for: 0 throughout a unit that is held out. `tokens` bound a pass
    (steps or pictures, where a stage counts those), `flops` are those of training on it once; the ``shared_`` ones are
    of what a pass reads once for all solutions of a unit.
    """

    names: Sequence[str]
    starts: "NDArray[np.int64]"
    samples: "NDArray[np.int64]"
    tokens: "NDArray[np.int64]"
    flops: "NDArray[np.float64]"
    shared_tokens: "NDArray[np.int64]"
    shared_flops: "NDArray[np.float64]"

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        samples: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        flops: Sequence[Sequence[float]],
        shared_tokens: Sequence[int],
        shared_flops: Sequence[float],
    ) -> "Units":
        """From one list a unit."""
        import numpy as np

        counts = np.array([len(of_unit) for of_unit in samples], dtype=np.int64)
        return cls(
            names=names,
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            samples=np.array(list(chain.from_iterable(samples)), dtype=np.int64),
            tokens=np.array(list(chain.from_iterable(tokens)), dtype=np.int64),
            flops=np.array(list(chain.from_iterable(flops)), dtype=np.float64),
            shared_tokens=np.array(shared_tokens, dtype=np.int64),
            shared_flops=np.array(shared_flops, dtype=np.float64),
        )

    @classmethod
    def singles(cls, names: Sequence[str], flops: float = 1.0) -> "Units":
        """Units of one sample each, all of the same cost, which share nothing."""
        ones = [[1]] * len(names)
        nothing = [0] * len(names)
        return cls.of(
            names,
            ones,
            ones,
            [[flops]] * len(names),
            nothing,
            nothing,
        )

    def __len__(self) -> int:
        return len(self.names)

    def of_unit(
        self,
        values: "NDArray[np.int64] | NDArray[np.float64]",
        unit: int,
    ) -> list[float]:
        """A unit's entries of one of the arrays."""
        entries: list[float] = values[self.starts[unit] : self.starts[unit + 1]].tolist()
        return entries

    def whole(self, unit: int) -> Part:
        """All solutions of a unit."""
        return Part(unit, tuple(range(int(self.starts[unit + 1] - self.starts[unit]))))

    def num_samples(self, parts: Iterable[Part]) -> int:
        """Solutions that parts stand for."""
        return int(self._total(self.samples, parts))

    def num_tokens(self, parts: Iterable[Part]) -> int:
        """Tokens of parts, what each shares counted once a part."""
        parts = list(parts)
        return int(self._total(self.tokens, parts)) + sum(int(self.shared_tokens[part.unit]) for part in parts)

    def num_flops(self, parts: Iterable[Part]) -> float:
        """FLOPs of parts, what each shares counted once a part."""
        parts = list(parts)
        return self._total(self.flops, parts) + sum(float(self.shared_flops[part.unit]) for part in parts)

    def _total(
        self,
        values: "NDArray[np.int64] | NDArray[np.float64]",
        parts: Iterable[Part],
    ) -> float:
        total = 0.0
        for part in parts:
            start = int(self.starts[part.unit])
            total += float(values[[start + place for place in part.solutions]].sum())
        return total

    def names_of(self, parts: Iterable[Part]) -> list[str]:
        """The names of the units, each once."""
        return list(dict.fromkeys(self.names[part.unit] for part in parts))


# What an update takes


def epoch_updates(
    units: Units,
    batch_size: int,
    questions_per_update: int,
    seed: int,
    epoch: int,
) -> list[list[Part]]:
    """The parts of each update of an epoch: units shuffled by (seed, epoch), cut where an update has its samples.

    Every solution is seen once. Of one unit an update takes at most ``batch_size / questions_per_update`` samples; the
    rest comes after all other units have been met. The last update may be smaller: its loss is a mean all the same.
    """
    totals = _unit_samples(units)
    order = [unit for unit, total in enumerate(totals) if total > 0]
    # By a string: random.Random takes its hash over all bits, so neighbouring seeds give unlike orders.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    limit = max(1, batch_size // questions_per_update)
    # Turns through all units: first each one's first part, then the second ones of those that have more.
    rounds: list[list[Part]] = []
    for unit in order:
        for number, part in enumerate(_cut(units, unit, totals[unit], limit)):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(part)
    updates: list[list[Part]] = []
    num_samples = 0
    for number, parts in enumerate(rounds):
        if number > 0:  # else its order is that of the units
            random.Random(f"{seed}/{epoch}/{number}").shuffle(parts)
        for part in parts:
            if not updates or num_samples >= batch_size:
                updates.append([])
                num_samples = 0
            updates[-1].append(part)
            num_samples += units.num_samples([part])
    return updates


def _unit_samples(units: Units) -> list[int]:
    import numpy as np

    cumulative = np.concatenate([np.zeros(1, np.int64), np.cumsum(units.samples)])
    totals: list[int] = np.diff(cumulative[units.starts]).tolist()
    return totals


def _cut(
    units: Units,
    unit: int,
    num_samples: int,
    limit: int,
) -> Iterator[Part]:
    """A unit in as few runs of neighbours as have about `limit` samples at most, all about equal."""
    num_parts = math.ceil(num_samples / limit)
    if num_parts == 1:
        yield units.whole(unit)
        return
    places: list[int] = []
    num_done = 0.0
    number = 1  # of the parts that would be full by now, were all samples as fine as that
    for place, samples in enumerate(units.of_unit(units.samples, unit)):
        places.append(place)
        num_done += samples
        if num_done * num_parts >= num_samples * number:
            yield Part(unit, tuple(places))
            places = []
            number = 1 + int(num_done * num_parts / num_samples)


# How an update is dealt to workers

Rounds = list[list[list[Part]]]
"""Passes of an update: in each round one of every worker, which is empty where there is nothing left to do."""


@dataclass
class _Pass:
    """Parts of one forward and backward pass, and what they cost together."""

    parts: list[Part] = field(default_factory=list)
    flops: float = 0.0
    tokens: float = 0.0

    def add(self, part: Part, flops: float, tokens: float) -> None:
        """Take a part."""
        self.parts.append(part)
        self.flops += flops
        self.tokens += tokens


@dataclass(frozen=True)
class _Share:
    """Some of a piece's solutions, and what a pass of them costs, what they share included."""

    solutions: tuple[int, ...]
    flops: float
    tokens: float


class _Piece:
    """A part that is still to be dealt, with the cost of each of its solutions, by its place."""

    def __init__(self, units: Units, part: Part) -> None:
        flops, tokens = units.of_unit(units.flops, part.unit), units.of_unit(units.tokens, part.unit)
        self.part = part
        self.flops = {place: flops[place] for place in part.solutions}
        self.tokens = {place: tokens[place] for place in part.solutions}
        self.shared_flops = float(units.shared_flops[part.unit])
        self.shared_tokens = float(units.shared_tokens[part.unit])
        self.total_flops = self.shared_flops + sum(self.flops.values())
        self.total_tokens = self.shared_tokens + sum(self.tokens.values())

    def share_for(
        self,
        target: _Pass,
        places: Sequence[int],
        most_flops: float,
        most_tokens: float,
    ) -> _Share | None:
        """Those of its solutions at `places` that a pass has room for, tried in that order; an empty pass takes one."""
        flops, tokens = target.flops + self.shared_flops, target.tokens + self.shared_tokens
        solutions: list[int] = []
        for place in places:
            fits = flops + self.flops[place] <= most_flops and tokens + self.tokens[place] <= most_tokens
            if fits or not (target.parts or solutions):
                solutions.append(place)
                flops += self.flops[place]
                tokens += self.tokens[place]
        if not solutions:
            return None
        return _Share(
            tuple(sorted(solutions)),
            flops - target.flops,
            tokens - target.tokens,
        )


def deal(
    parts: Sequence[Part],
    units: Units,
    num_workers: int,
    budget: int,
) -> Rounds:
    """An update's parts as rounds of passes of at most `budget` tokens, whose time is short by the FLOPs.

    A round takes as long as its longest pass. A solution that is longer than the budget goes alone.
    """
    # Two ways to deal, as no rule tells beforehand whether a prefix that is read twice pays.
    pieces = [_Piece(units, part) for part in parts]
    whole: list[_Piece] = []
    for piece in pieces:
        whole += _within(piece, budget, units)
    candidates: list[Rounds] = []
    for to_deal, may_split in ((whole, False), (pieces, True)):
        ordered = sorted(to_deal, key=lambda piece: (-piece.total_flops, piece.part))
        candidates.append(_rounds(ordered, num_workers, budget, may_split))
    # The first of equals: parts that stay whole.
    return min(candidates, key=lambda rounds: rounds_flops(rounds, units))


def rounds_flops(rounds: Rounds, units: Units) -> float:
    """What rounds take, in FLOPs of one worker: each its longest pass."""
    total = 0.0
    for passes in rounds:
        total += max(units.num_flops(parts) for parts in passes)
    return total


def deal_jointly(parts: Sequence[Part], num_workers: int, size: int) -> Rounds:
    """An update's samples in groups of `size` that are compared with each other, each divided over all workers."""
    rounds: Rounds = []
    for start in range(0, len(parts), size):
        group = parts[start : start + size]
        cuts = [number * len(group) // num_workers for number in range(num_workers + 1)]
        # The longest come first: where some have nothing, worker 0 has something to repeat.
        shares = [list(group[cuts[number] : cuts[number + 1]]) for number in range(num_workers)]
        rounds.append(sorted(shares, key=len, reverse=True))
    return rounds


def deal_held_out(
    held_out: Sequence[int],
    units: Units,
    num_workers: int,
) -> list[list[int]]:
    """Held-out units in rounds of one a worker at most, those of like cost together."""
    order = sorted(held_out, key=lambda unit: (-units.num_flops([units.whole(unit)]), unit))
    return [order[start : start + num_workers] for start in range(0, len(order), num_workers)]


def _within(piece: _Piece, budget: int, units: Units) -> list[_Piece]:
    """A part as pieces that fit the budget."""
    if piece.total_tokens <= budget:
        return [piece]
    pieces: list[_Piece] = []
    places = list(piece.part.solutions)
    while places:
        share = piece.share_for(_Pass(), places, math.inf, budget)
        assert share is not None  # an empty pass takes one
        pieces.append(_Piece(units, Part(piece.part.unit, share.solutions)))
        places = [place for place in places if place not in share.solutions]
    return pieces


def _rounds(
    pieces: Sequence[_Piece],
    num_workers: int,
    budget: int,
    may_split: bool,
) -> Rounds:
    """The fewest rounds that hold the pieces, and in them the lowest highest cost of a pass that was found."""
    num_rounds = max(1, math.ceil(sum(piece.total_tokens for piece in pieces) / (num_workers * budget)))
    passes = None
    while passes is None:
        num_passes = num_rounds * num_workers
        passes = _fill(
            pieces,
            num_passes,
            math.inf,
            budget,
            may_split,
        )
        num_rounds += 1
    # A lone worker runs all passes one after another: how they are cut makes no difference to it.
    if num_workers > 1:
        passes = _evened(passes, pieces, budget, may_split)
    passes.sort(key=lambda each: -each.flops)  # those of like cost side by side
    rounds: Rounds = []
    for start in range(0, len(passes), num_workers):
        round_passes = [each.parts for each in passes[start : start + num_workers]]
        if any(round_passes):
            rounds.append(round_passes)
    return rounds


def _evened(
    passes: list[_Pass],
    pieces: Sequence[_Piece],
    budget: int,
    may_split: bool,
) -> list[_Pass]:
    """The same pieces in as many passes, the most expensive of which is as cheap as a bisection finds."""
    # As MULTIFIT for machines of equal speed: guess the longest pass, and see whether everything then finds room.
    best, highest = passes, max(each.flops for each in passes)
    lowest = sum(piece.total_flops for piece in pieces) / len(passes)
    for _ in range(_BISECTIONS):
        if highest - lowest < 1e-3 * highest:
            break
        limit = (lowest + highest) / 2
        fitting = _fill(pieces, len(passes), limit, budget, may_split)
        highest_fitting = math.inf if fitting is None else max(each.flops for each in fitting)
        if fitting is not None and highest_fitting < highest:
            best, highest = fitting, highest_fitting
        else:
            lowest = limit
    return best


def _fill(
    pieces: Sequence[_Piece], num_passes: int, most_flops: float, budget: int, may_split: bool
) -> list[_Pass] | None:
    """Pieces, the most expensive first, each into the fullest pass that has room, else split; None: no room is left."""
    passes = [_Pass() for _ in range(num_passes)]
    for piece in pieces:
        fitting: _Pass | None = None
        for each in passes:
            fits = each.flops + piece.total_flops <= most_flops and each.tokens + piece.total_tokens <= budget
            # A solution is never cut: one beyond the budget has a pass to itself.
            is_alone = not each.parts and len(piece.flops) == 1
            if (fits or is_alone) and (fitting is None or each.flops > fitting.flops):
                fitting = each
        if fitting is not None:
            fitting.add(
                piece.part,
                piece.total_flops,
                piece.total_tokens,
            )
        elif not may_split or not _split(piece, passes, most_flops, budget):
            return None
    return passes


def _split(
    piece: _Piece,
    passes: Sequence[_Pass],
    most_flops: float,
    budget: int,
) -> bool:
    """Put a piece into several passes, as much as the emptiest one with room takes each time; whether it all fits."""
    # The largest first, so that small ones are left to fill what room there is.
    places = sorted(piece.part.solutions, key=lambda place: -piece.flops[place])
    while places:
        share = None
        for each in sorted(passes, key=lambda each: each.flops):
            share = piece.share_for(each, places, most_flops, budget)
            if share is not None:
                each.add(
                    Part(piece.part.unit, share.solutions),
                    share.flops,
                    share.tokens,
                )
                places = [place for place in places if place not in share.solutions]
                break
        if share is None:
            return False
    return True


# The size of a step, and what is held out


def learning_rate_factor(
    update: int,
    num_updates: int,
    warmup: float,
) -> float:
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
