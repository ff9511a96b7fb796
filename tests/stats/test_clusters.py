"""Clusters of questions, and what the intervals that resample them cover."""

from functools import partial

import numpy as np
import pyarrow as pa

from medmm_ray.stats.clusters import ClusterNames, clusters_of
from medmm_ray.stats.metrics import Floats, Ints, bootstrap, expanded_levels, sums_by_cluster


def test_what_is_linked_through_others_is_one_cluster() -> None:
    keys = [["a"], ["b"], [], ["b", "c"], ["d"], ["c"], [""], ["d", "a"], [""]]
    assert clusters_of(keys).tolist() == [0, 1, 2, 1, 0, 1, 3, 0, 4]
    assert clusters_of([]).tolist() == []


def test_clusters_of_tables_in_parts_are_named_by_their_least_question() -> None:
    rows = [
        ("q5", ["a"], ""),
        ("q2", ["b"], ""),
        ("q3", [], ""),
        ("q1", ["b", "c"], ""),
        ("q4", ["a"], "c"),
        ("q0", [], "c"),
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    lists = pa.array(columns[1], pa.list_(pa.string()))
    questions = pa.table({"question_id": columns[0], "image_ids": lists, "group": columns[2]})
    for cut in (0, 1, 4, 6):
        names = ClusterNames.of([questions.slice(0, cut), questions.slice(cut)])
        found = names.column(pa.chunked_array([["q5", "q4"], ["q3", "q2", "q1", "q0", "no such"]]))
        # A group is not an image of that name: q1 is with q2 alone.
        assert found.to_pylist() == ["q0", "q0", "q3", "q1", "q1", "q0", "no such"]
    assert ClusterNames.of([]).column(pa.chunked_array([["q"]])).to_pylist() == ["q"]


def test_sums_by_cluster() -> None:
    values = np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    assert sums_by_cluster(values, np.array([4, 0, 4])).tolist() == [[10, 20], [101, 202]]
    assert sums_by_cluster(values[:0], np.zeros(0, dtype=np.int64)).shape == (0, 2)


def test_levels_widen_where_rows_are_few() -> None:
    # t(9) .975 = 2.2622, times sqrt(10 / 9) = 2.3846: the normal distribution has .00855 below -2.3846.
    low, high = expanded_levels(10)
    assert (round(low, 3), round(high, 3)) == (0.855, 99.145)
    assert np.allclose(expanded_levels(10**7), (2.5, 97.5), atol=1e-5)


def covers(num_images: int, clustered: bool, trial: int) -> bool:
    """Whether the interval of one drawn set of questions, of which those on an image resemble each other, has .6."""
    rng = np.random.default_rng([num_images, trial])
    num_questions = rng.integers(1, 12, num_images)
    image: Ints = np.repeat(np.arange(num_images), num_questions)
    skill = rng.beta(1.2, 0.8, num_images)  # of mean .6
    right: Floats = (rng.random(len(image)) < skill[image]).astype(np.float64)
    low, high = bootstrap(right[:, None], 300, trial, image if clustered else None)
    return bool(low[0] <= 0.6 <= high[0])


def coverage(num_images: int, clustered: bool) -> float:
    return float(np.mean(list(map(partial(covers, num_images, clustered), range(400)))))


def test_intervals_by_cluster_cover_what_intervals_by_question_do_not() -> None:
    """Of 2,000 sets: 71 % by question, 93 % by cluster; of 12 images 94 %, and 91 % without the wider levels."""
    assert coverage(60, clustered=False) < 0.8
    assert 0.92 < coverage(60, clustered=True) < 0.975
    assert 0.90 < coverage(12, clustered=True) < 0.975
