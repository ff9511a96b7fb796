"""resampling.py: what lies in a file gives the intervals of what is in memory."""

import numpy as np
import pytest

from medmm_ray.stats import resampling
from medmm_ray.stats.metrics import Floats, cluster_bootstrap
from medmm_ray.stats.resampling import CountRows, Resampling


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


def test_no_row_gives_no_interval_and_no_resample_is_refused() -> None:
    low, high = Resampling(10, 0).interval(CountRows(2, np.uint32), ratio)
    assert np.isnan([*low, *high]).all()
    with pytest.raises(ValueError, match="num of a resampling is 0"):
        Resampling(0, 0)
