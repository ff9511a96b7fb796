"""What an estimate says: a line a step, and their sums."""

from dataclasses import dataclass

from medmm_ray.estimate.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step: `dollars` go to others (an API, readers), GPU time is priced apart; `stored` is in bytes."""

    step: str
    work: str
    calls: float = 0
    tokens: float = 0
    dollars: float = 0
    gpu_hours: float = 0
    stored: float = 0
    notes: tuple[str, ...] = ()
    """What a reader would ask about it."""


@dataclass(frozen=True)
class Estimate:
    """A run's lines, and notes on them for people."""

    sizes: Sizes
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def line(self, step: str) -> Line:
        """The line of a step."""
        return next(line for line in self.lines if line.step == step)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps."""
        return sum(line.gpu_hours for line in self.lines)

    @property
    def gpu_dollars(self) -> float:
        """US dollars of the GPU-hours."""
        return self.gpu_hours * self.sizes.hardware.price

    @property
    def hours(self) -> float:
        """Wall-clock hours of the GPU work at the run's number of GPUs, all of them busy."""
        return self.gpu_hours / self.sizes.hardware.num_gpus

    @property
    def dollars(self) -> float:
        """US dollars of everything."""
        return sum(line.dollars for line in self.lines) + self.gpu_dollars

    @property
    def stored(self) -> float:
        """Bytes of all steps."""
        return sum(line.stored for line in self.lines)


def size(stored: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if stored < 1000:
            return f"{stored:.3g} {unit}"
        stored /= 1000
    return f"{stored:,.1f} TB"
