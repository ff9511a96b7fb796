"""resampling.py: what lies in a file gives the intervals of what is in memory."""

import numpy as np
import pytest

from medmm_ray.stats import resampling
from medmm_ray.stats.metrics import Floats, cluster_bootstrap
from medmm_ray.stats.resampling import CountRows, Draws, Resampling


def ratio(sums_BK: Floats) -> Floats:
    above_B1: Floats = sums_BK[:, :1] / np.maximum(sums_BK[:, 1:], 1)
    return above_B1


@pytest.mark.parametrize("num_rows", [1, 7, 5000])
def test_intervals_of_counts_in_files_are_those_of_counts_in_memory(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of a few rows and resamples, and files on disk from the first kilobyte on.
    monkeypatch.setattr(resampling, "BLOCK_CELLS", 9000)
    monkeypatch.setattr(resampling, "MEMORY_BYTES", 1024)
    counts = np.random.default_rng(1).integers(0, 60, (num_rows, 2)).astype(np.float64)
    rows = CountRows(2, np.uint32)
    for start in range(0, num_rows, 999):
        rows.append(counts[start : start + 999])
    low, high = Resampling(300, 5).interval(rows, ratio)
    expected_low, expected_high = cluster_bootstrap(counts, ratio, 300, 5)
    assert (low.tolist(), high.tolist()) == (expected_low.tolist(), expected_high.tolist())
    assert rows.read(num_rows - 1, num_rows).tolist() == counts[-1:].tolist()


def test_many_rows_are_drawn_in_pieces_as_often_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWN_ROWS", 300)
    draws = Draws(1000, 400, seed=2)
    rows = CountRows(4, np.uint32)
    rows.append(np.ones((1000, 4)) * (np.arange(1000)[:, None] // 300 == np.arange(4)))  # which piece a row is of
    sums_BK = draws.sums(rows)
    assert set(sums_BK.sum(axis=1)) == {1000.0}
    sizes = np.array([300, 300, 300, 100])
    assert np.allclose(sums_BK.mean(axis=0), sizes, atol=3)
    # Of a multinomial draw: n p (1 - p).
    assert np.allclose(sums_BK.var(axis=0), sizes * (1 - sizes / 1000), rtol=0.25)
    assert set(np.unique(draws._read(0, 1000))) >= {0, 1, 2, 3, 4}
    assert np.isclose(draws._read(0, 1000).var(), 1, rtol=0.02)


def test_no_row_gives_no_interval_and_no_resample_is_refused() -> None:
    low, high = Resampling(10, 0).interval(CountRows(2, np.uint32), ratio)
    assert np.isnan([*low, *high]).all()
    with pytest.raises(ValueError, match="num of a resampling is 0"):
        Resampling(0, 0)
