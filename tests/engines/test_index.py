"""Search is exact, and its order depends on nothing but ids and similarities."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines.index import Index, IndexConfig, Kind, Shard, Vectors
from medmm_ray.engines.index.shard import kind_of, num_codes


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
    names = sorted(p.name for p in (tmp_path / "sub").iterdir())
    assert names == ["images.faiss", "images.ids.json", "images.shards.json"]
    assert again.search(unit(4, seed=2), 5) == index.search(unit(4, seed=2), 5)
    assert (again.width, len(again)) == (16, 50)


def mixed(rows: int, seed: int = 0) -> Vectors:
    """Vectors around 100 centres, as those of pictures of some kinds are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(100, 16))
    vectors_ND = (centres[rng.integers(0, 100, rows)] + 0.4 * rng.normal(size=(rows, 16))).astype(np.float32)
    unit_ND: Vectors = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


MANY = mixed(10_000)
NAMES = [f"v{i:05}" for i in range(10_000)]


def true_nearest(queries_QD: Vectors, k: int) -> list[set[str]]:
    order = np.argsort(-(queries_QD @ MANY.T), axis=1)
    return [{NAMES[i] for i in rows[:k]} for rows in order]


@pytest.mark.parametrize("kind", ["hnsw", "ivf_pq"])
def test_an_approximate_index_finds_nearly_all_and_gives_exact_similarities(kind: Kind, tmp_path: Path) -> None:
    queries_QD = mixed(50, seed=1)
    index = Index.build(NAMES, MANY, IndexConfig(method=kind))
    index.save(tmp_path / "images")
    again = Index.load(tmp_path / "images")
    ids, similarities = again.search(queries_QD, 10)
    assert [shard.kind for shard in again.shards] == [kind]
    assert (ids, similarities) == index.search(queries_QD, 10)
    hits = [len(names & set(row)) for names, row in zip(true_nearest(queries_QD, 10), ids, strict=True)]
    assert np.mean(hits) >= 9.5
    for q, names in enumerate(ids):
        rows = [int(name[1:]) for name in names]
        assert similarities[q] == pytest.approx(queries_QD[q] @ MANY[rows].T, abs=1e-5)
        assert similarities[q] == sorted(similarities[q], reverse=True)
    assert again.shards[0].exact().search(queries_QD, 3) == Index.build(NAMES, MANY).shards[0].search(queries_QD, 3)


def test_lists_that_are_all_probed_and_compared_equal_exact_search() -> None:
    queries_QD = mixed(6, seed=3)
    lists = IndexConfig(method="ivf_pq", num_probes=1000, rerank_factor=1000)
    assert Index.build(NAMES, MANY, lists).search(queries_QD, 5) == Index.build(NAMES, MANY).search(queries_QD, 5)


def test_one_list_probed_leaves_no_empty_places() -> None:
    index = Index.build(NAMES, MANY, IndexConfig(method="ivf_pq", num_probes=1))
    (ids,), (similarities,) = index.search(mixed(1, seed=3), 500)
    assert 0 < len(ids) == len(similarities) < 500
    assert min(similarities) >= -1.0


def test_the_kind_goes_by_the_number_of_vectors() -> None:
    auto = IndexConfig(exact_up_to=20_000, graph_up_to=50_000)
    assert [kind_of(auto, number, number) for number in (20_000, 20_001, 50_000, 50_001)] == [
        "flat",
        "hnsw",
        "hnsw",
        "ivf_pq",
    ]
    # A small shard of a large index, as one that was added.
    assert [kind_of(auto, number, 60_000) for number in (9_983, 9_984)] == ["flat", "ivf_pq"]
    assert kind_of(IndexConfig(method="hnsw"), 9_983, 9_983) == "flat"
    assert kind_of(IndexConfig(method="flat"), 10**9, 10**9) == "flat"
    assert [num_codes(width) for width in (512, 768, 384, 16, 2)] == [64, 64, 64, 4, 1]


def test_shards_give_what_one_index_of_all_gives(tmp_path: Path) -> None:
    same = np.tile(unit(1), (30, 1))  # ties across shards
    vectors_ND = np.concatenate([unit(170), same])
    names = [f"v{i:03}" for i in np.random.default_rng(0).permutation(200)]
    config = IndexConfig()
    shards = [Shard.build(names[i::3], vectors_ND[i::3], "flat", config) for i in range(3)]
    Index(shards).save(tmp_path / "images")
    again = Index.load(tmp_path / "images")
    expected = Index.build(names, vectors_ND)
    for queries_QD in (unit(5, seed=1), same[:1]):
        for k in (1, 7, 25, 300):
            assert again.search(queries_QD, k) == expected.search(queries_QD, k)
    assert (len(again), again.width, sorted(again.ids)) == (200, 16, sorted(names))
    (tmp_path / "images-2.faiss").unlink()
    with pytest.raises(ConfigError, match=r"no index can be read at .*images-2.faiss"):
        Index.load(tmp_path / "images")


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    config = IndexConfig()
    Index([Shard.build(["a"], unit(1), "flat", config), Shard.build(["b"], unit(1, width=8), "flat", config)]).save(
        tmp_path / "mixed"
    )
    with pytest.raises(ConfigError, match=r"shards of widths \[8, 16\]"):
        Index.load(tmp_path / "mixed")


class FakeGpus:
    """FAISS's calls for GPUs: what is moved answers as on the CPU, and no more than 2,048 neighbours a query."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import faiss

        self.moved: list[str] = []
        self.searches = 0
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", self.move)

    def move(self, index: Any) -> Any:
        import faiss

        self.moved.append(type(index).__name__)
        copy: Any = faiss.clone_index(index)
        search = copy.search

        def counted(queries_QD: Vectors, k: int) -> Any:
            assert k <= 2048
            self.searches += 1
            return search(queries_QD, k)

        copy.search = counted
        return copy


def test_on_gpus_the_same_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    queries_QD = mixed(5, seed=1)
    for kind in ("flat", "hnsw", "ivf_pq"):
        Index.build(NAMES, MANY, IndexConfig(method=kind)).save(tmp_path / kind)
    expected = {kind: Index.load(tmp_path / kind).search(queries_QD, 10) for kind in ("flat", "hnsw", "ivf_pq")}
    gpus = FakeGpus(monkeypatch)
    loaded = {kind: Index.load(tmp_path / kind) for kind in expected}
    # A graph cannot be moved.
    assert gpus.moved == ["IndexFlatIP", "IndexIVFPQ"]
    assert {kind: index.search(queries_QD, 10) for kind, index in loaded.items()} == expected
    assert gpus.searches == 1
    # More than a GPU gives come from the CPU.
    assert len(loaded["flat"].search(queries_QD[:1], 3000)[0][0]) == 3000
    assert gpus.searches == 1


def test_lists_are_found_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    queries_QD = mixed(5, seed=1)
    gpus = FakeGpus(monkeypatch)
    index = Index.build(NAMES, MANY, IndexConfig(method="ivf_pq"))
    assert gpus.moved == ["IndexFlatIP"]
    ids, _ = index.search(queries_QD, 10)
    hits = [len(names & set(row)) for names, row in zip(true_nearest(queries_QD, 10), ids, strict=True)]
    assert np.mean(hits) >= 9.5


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
