"""GPUs, their prices, and the hours that models take on them."""

from collections.abc import Mapping
from dataclasses import dataclass

PREFILL, TRAINING, DECODING = 0.28, 0.35, 0.15  # shares of a GPU's peak


@dataclass(frozen=True)
class Gpu:
    """`peak` is dense bfloat16 TFLOP/s by the vendor's data sheet, `memory` GB, `price` US dollars an hour.

    Prices are round on-demand figures that a recipe overrides; the A100's is the published plan's $10 for four.
    """

    peak: float
    memory: int
    price: float


GPUS: Mapping[str, Gpu] = {
    "A100-80G": Gpu(312, 80, 2.50),
    "A100-40G": Gpu(312, 40, 2.00),
    "H100": Gpu(989, 80, 4.00),
    "H200": Gpu(989, 141, 5.00),
    "L40S": Gpu(362, 48, 1.50),
    "L4": Gpu(121, 24, 0.80),
}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs of a run: their kind, their number and their price."""

    gpu: str = "A100-80G"
    num_gpus: int = 4
    dollars_per_gpu_hour: float | None = None
    """None: the table's price."""

    @property
    def specification(self) -> Gpu:
        """The GPU's row of the table; raises ValueError for one that it does not have."""
        if self.gpu not in GPUS:
            raise ValueError(f"gpu {self.gpu!r} is not in the table; known: {', '.join(GPUS)}")
        return GPUS[self.gpu]

    @property
    def price(self) -> float:
        """US dollars of a GPU-hour."""
        return self.specification.price if self.dollars_per_gpu_hour is None else self.dollars_per_gpu_hour

    def prefill_hours(self, parameters: float, tokens: float) -> float:
        """GPU-hours in which a model of so many parameters takes in `tokens` (prompts, scoring)."""
        # A multiplication and an addition for each parameter and token.
        return self._hours(2 * parameters * tokens, PREFILL)

    def decode_hours(self, parameters: float, tokens: float) -> float:
        """GPU-hours in which it generates `tokens`."""
        return self._hours(2 * parameters * tokens, DECODING)

    def training_hours(self, parameters: float, tokens: float) -> float:
        """GPU-hours in which it is trained on `tokens`, forward and backward."""
        # Backward costs twice as much as forward.
        return self._hours(6 * parameters * tokens, TRAINING)

    def _hours(self, operations: float, share: float) -> float:
        return operations / (self.specification.peak * 1e12 * share) / 3600
