"""Intervals of figures that are made of sums over questions, in memory that does not grow with the questions.

Counts by question lie in a temporary file once they are many, and so does how often each resample draws each question:
what is in memory is a block of both.

Legend: B resamples, Q questions, K numbers of each.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medmm_ray.stats.metrics import Floats, finite, percentile_interval

MEMORY_BYTES = 256 << 10
"""What a file keeps in memory."""
BLOCK_CELLS = 2**19
"""Draws that are in memory at a time, 4 MB."""
DRAWN_ROWS = 2**17
"""Rows whose draws are made at a time, 1 MB."""
DRAWS_KEPT = 2
"""Draws whose numbers of questions were asked for last."""


class CountRows:
    """Rows of `num_columns` numbers, which are appended and read by their places."""

    def __init__(self, num_columns: int, dtype: DTypeLike) -> None:
        self.num_columns = num_columns
        self._dtype = np.dtype(dtype)
        self._num_rows = 0
        self._file = SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - it lives as long as its rows

    def __len__(self) -> int:
        return self._num_rows

    def append(self, rows_QK: NDArray[np.generic]) -> None:
        """Add rows behind the others."""
        # Reading has moved it.
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows_QK, dtype=self._dtype).tobytes())
        self._num_rows += len(rows_QK)

    def read(self, start: int, stop: int) -> Floats:
        """The rows from `start` on, before `stop`."""
        row_bytes = self.num_columns * self._dtype.itemsize
        self._file.seek(start * row_bytes)
        values = np.frombuffer(self._file.read((stop - start) * row_bytes), self._dtype)
        return values.reshape(stop - start, self.num_columns).astype(np.float64)


class Draws:
    """How often each of `num_rows` rows is drawn in each of `num` resamples of as many rows, with replacement."""

    def __init__(self, num_rows: int, num: int, seed: int) -> None:
        self.num_rows = num_rows
        self.num = num
        # A byte each: that a row is drawn 256 times in a resample has a chance of 1 in 10^500.
        self._times = SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - it lives as long as this
        rng = np.random.default_rng(seed)
        if num_rows > DRAWN_ROWS:
            for _ in range(num):
                for times_Q in _times_in_pieces(num_rows, rng):
                    self._times.write(times_Q.astype(np.uint8).tobytes())
            return
        even = np.full(num_rows, 1 / num_rows)
        block = max(1, BLOCK_CELLS // num_rows)
        for start in range(0, num, block):
            size = min(block, num - start)
            times_BQ = rng.multinomial(num_rows, even, size=size)
            self._times.write(times_BQ.astype(np.uint8).tobytes())

    def sums(self, rows: CountRows) -> Floats:
        """The sums of the rows in each resample [B, K]."""
        sums_BK = np.zeros((self.num, rows.num_columns))
        block = max(1, BLOCK_CELLS // self.num)
        for start in range(0, self.num_rows, block):
            stop = min(start + block, self.num_rows)
            sums_BK += self._read(start, stop).astype(np.float64) @ rows.read(start, stop)
        return sums_BK

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        times_BQ = np.empty((self.num, stop - start), dtype=np.uint8)
        for resample in range(self.num):
            self._times.seek(resample * self.num_rows + start)
            times_BQ[resample] = np.frombuffer(self._times.read(stop - start), np.uint8)
        return times_BQ


def _times_in_pieces(num_rows: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """How often each row is drawn in a resample, `DRAWN_ROWS` of them at a time.

    To draw from a piece and the rest, and then from the rest, is to draw from all rows: the numbers may differ, their
    distribution does not.
    """
    rows_left = draws_left = num_rows
    while rows_left > DRAWN_ROWS:
        shares = np.full(DRAWN_ROWS + 1, 1 / rows_left)
        shares[-1] = 1 - DRAWN_ROWS / rows_left
        times_Q = rng.multinomial(draws_left, shares)
        yield times_Q[:-1]
        rows_left, draws_left = rows_left - DRAWN_ROWS, int(times_Q[-1])
    yield rng.multinomial(draws_left, np.full(rows_left, 1 / rows_left))


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn. Figures of equally many questions share their resamples, so that they may be compared.

    Raises ValueError where `num` is below 1.
    """

    num: int
    seed: int
    _draws: OrderedDict[int, Draws] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num of a resampling is {self.num}; expected at least 1 (thousands, for an interval)")

    def interval(
        self,
        rows: CountRows,
        statistic: Callable[[Floats], Floats],
    ) -> tuple[Floats, Floats]:
        """`metrics.cluster_bootstrap` of rows that may lie in a file; the same bits for whole numbers of up to
        `DRAWN_ROWS` rows."""
        if not len(rows):
            num_figures = statistic(np.zeros((1, rows.num_columns))).shape[1]
            undefined_F = np.full(num_figures, np.nan)
            return undefined_F, undefined_F
        sums_BK = self._draws_of(len(rows)).sums(rows)
        return percentile_interval(statistic(finite("sums over questions", sums_BK)), len(rows))

    def _draws_of(self, num_rows: int) -> Draws:
        if num_rows not in self._draws:
            self._draws[num_rows] = Draws(num_rows, self.num, self.seed)
            if len(self._draws) > DRAWS_KEPT:
                self._draws.popitem(last=False)
        self._draws.move_to_end(num_rows)
        return self._draws[num_rows]
