"""grouped_stats.py: shares, weights and intervals by group."""

from dataclasses import replace

import numpy as np
import pytest

from medmm_ray.stats.grouped_stats import (
    CountedFigure,
    GroupedCounts,
    GroupFigure,
    Groups,
    RatioCounts,
    share_of_counts,
    stats_by_group,
)
from medmm_ray.stats.resampling import Resampling

HOW = Resampling(400, 0)


def test_shares_by_group_with_and_without_weights() -> None:
    question, hit = np.array([0, 0, 1, 1, 2]), np.array([1, 0, 1, 1, 0])
    groups = {"kind": Groups(("a", "b", "c"), np.array([0, 0, 0, 1, 1]))}
    plain = stats_by_group(groups, question, hit, 2, share_of_counts, HOW)
    overall = plain["all"]["all"]
    assert replace(overall, low=0, high=0) == GroupFigure(
        value=0.6, low=0, high=0, count=5, questions=3, effective=5.0, cells=[2.0, 3.0]
    )
    assert overall.low is not None
    assert overall.high is not None
    assert 0 <= overall.low < 0.6 < overall.high <= 1
    assert list(plain["kind"]) == ["a", "b"]
    assert plain["kind"]["a"].value == pytest.approx(2 / 3, abs=1e-6)
    weighted = stats_by_group(groups, question, hit, 2, share_of_counts, HOW, np.array([1.0, 3, 2, 2, 2]))
    assert weighted["all"]["all"].value == 0.5
    assert weighted["all"]["all"].effective == 4.5  # 10 ** 2 / 22, to one digit
    assert weighted["kind"]["b"].value == 0.5
    assert weighted["kind"]["b"].effective == 2.0


def test_a_single_question_has_no_interval_and_no_entry_no_figure() -> None:
    one = stats_by_group({}, np.zeros(4, dtype=np.int64), np.array([0, 1, 1, 1]), 2, share_of_counts, HOW)["all"]["all"]
    assert (one.value, one.low, one.high, one.questions) == (0.75, None, None, 1)
    none = np.zeros(0, dtype=np.int64)
    assert stats_by_group({"g": Groups(("a",), none)}, none, none, 2, share_of_counts, HOW) == {"all": {}, "g": {}}


def test_intervals_are_as_wide_as_the_questions_say() -> None:
    """100 questions of 50 entries that all say the same tell as much as 100 entries, not as 5,000."""
    hit = (np.arange(100) < 30).astype(np.int64)
    alone = stats_by_group({}, np.arange(100), hit, 2, share_of_counts, HOW)["all"]["all"]
    many = stats_by_group({}, np.repeat(np.arange(100), 50), np.repeat(hit, 50), 2, share_of_counts, HOW)["all"]["all"]
    assert (many.value, many.low, many.high) == (alone.value, alone.low, alone.high)
    assert many.low is not None
    assert many.high is not None
    assert many.high - many.low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 100) ** 0.5, rel=0.15)


def test_clusters_are_resampled_whole() -> None:
    """10 images of 10 questions that all say the same tell as much as 10 questions, not as 100."""
    hit = (np.arange(10) < 3).astype(np.int64)
    alone = stats_by_group({}, np.arange(10), hit, 2, share_of_counts, HOW)["all"]["all"]
    counts, ratio_counts = GroupedCounts(2), RatioCounts()
    cluster_Q = np.repeat(np.arange(10), 10)
    counts.add({}, np.arange(100), np.repeat(hit, 10), cluster_Q=cluster_Q)
    ratio_counts.add(np.repeat(hit, 10).astype(np.float64), np.ones(100), cluster_Q)
    shared, mean = counts.stats(share_of_counts, HOW)["all"]["all"], ratio_counts.figure(HOW)
    assert (shared.value, shared.low, shared.high) == (alone.value, alone.low, alone.high)
    assert (mean.value, mean.low, mean.high) == (alone.value, alone.low, alone.high)
    assert (shared.count, shared.questions, mean.questions) == (100, 100, 100)


def test_a_single_cluster_has_no_interval() -> None:
    counts = GroupedCounts(2)
    counts.add({}, np.arange(4), np.array([0, 1, 1, 1]), cluster_Q=np.zeros(4, dtype=np.int64))
    figure = counts.stats(share_of_counts, HOW)["all"]["all"]
    assert (figure.value, figure.low, figure.high, figure.questions) == (0.75, None, None, 4)


def ratio(above: list[float], below: list[float]) -> CountedFigure:
    counts = RatioCounts()
    counts.add(np.array(above), np.array(below))
    return counts.figure(HOW)


def test_ratio_of_sums() -> None:
    found = ratio([10.0, 30, 0], [2.0, 3, 0])
    assert (found.value, found.count, found.questions) == (8.0, 5, 2)
    assert (found.low, found.high) == (5.0, 10.0)
    assert ratio([0.0], [0.0]).value is None


def test_counts_of_some_questions_at_a_time_are_those_of_all() -> None:
    """To the last bit, with weights too: the rows that are resampled have the same order."""
    rng = np.random.default_rng(0)
    question = np.sort(rng.integers(0, 500, 4000))
    cell, member = rng.integers(0, 2, 4000), rng.integers(0, 3, 4000)
    for weight in (None, 1 / rng.uniform(0.01, 1, 4000)):
        whole = stats_by_group({"g": Groups("abc", member)}, question, cell, 2, share_of_counts, HOW, weight)
        counts = GroupedCounts(2)
        for chosen in (question < 120, (question >= 120) & (question < 121), question >= 121):
            of_chosen = None if weight is None else weight[chosen]
            counts.add({"g": Groups("abc", member[chosen])}, question[chosen], cell[chosen], of_chosen)
        assert counts.stats(share_of_counts, HOW) == whole
