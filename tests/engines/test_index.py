"""Search is exact, and its order depends on nothing but ids and similarities."""

from pathlib import Path

import numpy as np
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines.index import Index, IndexConfig, Vectors


def unit(rows: int, width: int = 16, seed: int = 0) -> Vectors:
    vectors_ND = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    unit_ND: Vectors = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


def test_search_is_the_brute_force_order() -> None:
    vectors_ND, queries_QD = unit(200), unit(5, seed=1)
    index = Index.build([f"v{i:03}" for i in range(200)], vectors_ND)
    ids, similarities = index.search(queries_QD, 7)
    expected = queries_QD @ vectors_ND.T
    for q in range(5):
        best = np.argsort(-expected[q], kind="stable")[:7]
        assert ids[q] == [f"v{i:03}" for i in best]
        assert similarities[q] == pytest.approx(expected[q][best], abs=1e-5)


def test_equal_similarities_come_in_the_order_of_ids_whatever_the_order_of_rows() -> None:
    same = np.tile(np.array([[1.0, 0.0]], np.float32), (40, 1))
    names = [f"n{i:02}" for i in range(40)]
    shuffled = list(np.random.default_rng(0).permutation(names))
    for order in (names, names[::-1], shuffled):
        ids, similarities = Index.build(order, same).search(same[:1], 3)
        assert (ids, similarities) == ([["n00", "n01", "n02"]], [[1.0, 1.0, 1.0]])


def test_a_tie_at_the_cut_beside_a_clear_winner() -> None:
    vectors_ND = np.array([[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0]], np.float32)
    ids, similarities = Index.build(["d", "c", "b", "z"], vectors_ND).search(np.array([[1.0, 0.0]]), 2)
    assert (ids, similarities) == ([["z", "b"]], [[1.0, 0.6]])


def test_fewer_vectors_than_asked_for() -> None:
    index = Index.build(["b", "a"], np.eye(2, dtype=np.float32))
    assert index.search(np.array([[0.8, 0.6]]), 9) == ([["b", "a"]], [[0.8, 0.6]])


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    Index.build([], np.zeros((0, 0), np.float32)).save(tmp_path / "none")
    index = Index.load(tmp_path / "none")
    assert (len(index), index.search(unit(2), 3)) == (0, ([[], []], [[], []]))


def test_saved_and_loaded(tmp_path: Path) -> None:
    index = Index.build([f"v{i}" for i in range(50)], unit(50))
    index.save(tmp_path / "sub" / "images")
    again = Index.load(tmp_path / "sub" / "images")
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["images.faiss", "images.ids.json"]
    assert again.search(unit(4, seed=2), 5) == index.search(unit(4, seed=2), 5)
    assert (again.width, len(again)) == (16, 50)


def test_inverted_lists_with_all_probed_equal_exact_search() -> None:
    vectors_ND, queries_QD = unit(600), unit(6, seed=3)
    ids = [f"v{i:03}" for i in range(600)]
    exact = Index.build(ids, vectors_ND)
    inverted = Index.build(ids, vectors_ND, IndexConfig(exact_up_to=500, num_probes=1000))
    assert inverted.search(queries_QD, 5) == exact.search(queries_QD, 5)


def test_inverted_lists_with_one_probed_leave_no_empty_places() -> None:
    index = Index.build([f"v{i:03}" for i in range(600)], unit(600), IndexConfig(exact_up_to=500, num_probes=1))
    (ids,), (similarities,) = index.search(unit(1, seed=3), 200)
    assert 0 < len(ids) == len(similarities) < 200
    assert min(similarities) >= -1.0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 ids \\(1 distinct\\) for 2 vectors"):
        Index.build(["a", "a"], unit(2))
    with pytest.raises(ValueError, match="width 16, the queries have shape \\(2, 8\\)"):
        Index.build(["a"], unit(1)).search(unit(2, width=8), 1)
    broken = np.array([[np.nan, 1.0], [1.0, np.inf], [1.0, 0.0]], np.float32)
    for vectors_ND, words in (
        (broken, "2 of 3 {} hold NaN"),
        (np.eye(3, 2, dtype=np.float32), "1 of 3 {} have length 0"),
    ):
        with pytest.raises(ValueError, match=words.format("vectors")):
            Index.build(["a", "b", "c"], vectors_ND)
        with pytest.raises(ValueError, match=words.format("queries")):
            Index.build(["a"], unit(1, width=2)).search(vectors_ND, 1)
    with pytest.raises(ConfigError, match="no index can be read at"):
        Index.load(tmp_path / "none")
    Index.build(["a", "b"], unit(2)).save(tmp_path / "cut")
    (tmp_path / "cut.ids.json").write_text('["a"]')
    with pytest.raises(ConfigError, match="2 vectors but 1 ids"):
        Index.load(tmp_path / "cut")
