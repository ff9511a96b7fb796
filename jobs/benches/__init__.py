"""The benchmarks of `jobs.bench`, a module each: a ``BenchConfig``, and ``measure``, which gives rows."""

import operator
import re
from dataclasses import dataclass

_COMPARE = {"≥": operator.ge, "≤": operator.le}


@dataclass(frozen=True)
class Measured:
    """One row: two figures of the same run and their ratio (gain or share), beside what it should be.

    `target` is a text such as "≥ 8" or "≤ 0.5", empty where nothing is asked.
    """

    name: str
    baseline: float
    ours: float
    ratio: float
    target: str
    unit: str

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        target = re.fullmatch(r"([≥≤]) ([\d.]+)", self.target)
        return _COMPARE[target[1]](self.ratio, float(target[2])) if target else None
