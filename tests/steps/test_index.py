"""The two indexes hold what has a vector, in shards that tasks build of their rows alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.records import Image, Passage, Vector, to_arrow
from medmm_ray.data.tables import Artifact, Table, TableError
from medmm_ray.engines.encoder_identity import EncoderIdentity
from medmm_ray.engines.index import Index, IndexConfig
from medmm_ray.engines.index.collection import Collection, collection_names
from medmm_ray.engines.index.encoders import IndexEncoders
from medmm_ray.engines.index.lexical import words_of
from medmm_ray.estimate import Sizes
from medmm_ray.steps.index import (
    BuiltShard,
    build_index,
    in_turn,
    index_cost,
    over_ray,
    recall_of,
    recorded_encoder,
    sources,
    vector_source,
)
from medmm_ray.steps.index.sources import passage_sources
from tests.doubles.vector_tables import table_of, vector_table

FIGURES = {
    "images": 2.0,
    "images_shards": 1.0,
    "images_recall_at_10": 1.0,
    "passages_books": 1.0,
    "passages_books_shards": 1.0,
    "passages_books_recall_at_10": 1.0,
    "passages_guidelines": 2.0,
    "passages_guidelines_shards": 1.0,
    "passages_guidelines_recall_at_10": 1.0,
}


def vector(item_id: str, values: list[float], error: str | None = None) -> Vector:
    return Vector(item_id=item_id, vector=values, error=error)


def image(image_id: str, split: str) -> Image:
    return Image(
        image_id=image_id, uri=f"/data/{image_id}.png", sha256=image_id * 2, perceptual_hash="", width=1, height=1,
        split=split, modality="radiology", diagnosis="normal", annotation="",
    )  # fmt: skip


def passage(
    passage_id: str, corpus: str, title: str, text: str, values: list[float], error: str | None = None
) -> Passage:
    return Passage(
        passage_id=passage_id, document_id=passage_id[:2], corpus=corpus, title=title, text=text, date="2024",
        modality="", vector=values, error=error,
    )  # fmt: skip


IMAGES = to_arrow(
    Vector,
    [
        vector("im3", [0.0, 1.0]),
        vector("im1", [1.0, 0.0]),
        vector("im2", [], "image_empty: x"),
    ],
)
PASSAGES = to_arrow(
    Passage,
    [
        passage("d1#0", "guidelines", "Effusion", "Fluid in the pleural space.", [0.0, 0.0, 1.0]),
        passage("d2#0", "books", "", "A fracture of the rib.", [0.0, 1.0, 0.0]),
        passage("d1#1", "guidelines", "Effusion", "It blunts the angle.", [1.0, 0.0, 0.0]),
        passage("d3#0", "books", "", "Nothing.", [], "not_finite: x"),
    ],
)


def many(number: int, width: int = 8, seed: int = 0) -> pa.Table:
    """Vectors by shuffled names; every fiftieth has an error instead."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(50, width))
    values = centres[rng.integers(0, 50, number)] + 0.4 * rng.normal(size=(number, width))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    rows = []
    for i in rng.permutation(number):
        broken = i % 50 == 49
        rows.append(vector(f"v{i:06}", [] if broken else values[i].tolist(), "not_finite: x" if broken else None))
    return to_arrow(Vector, rows)


def sound_ids(rows: pa.Table) -> list[str]:
    return sorted(row["item_id"] for row in rows.to_pylist() if row["error"] is None)


def tables(folder: str) -> list[Table]:
    """The tables images, image_vectors and passages."""
    images = to_arrow(
        Image, [image("im1", "train"), image("im2", "train"), image("im3", "train"), image("im4", "test")]
    )
    of_test_image = to_arrow(Vector, [vector("im4", [1.0, 0.0])])
    return [
        table_of(Image, images, f"{folder}/images"),
        vector_table(f"{folder}/image_vectors", pa.concat_tables([IMAGES, of_test_image]), rows_per_file=2),
        table_of(Passage, PASSAGES, f"{folder}/passages", rows_per_file=3),
    ]


def test_what_has_a_vector_is_indexed_with_what_it_is_of(tmp_path: Path) -> None:
    figures = build_index(sources(*tables(str(tmp_path))), IndexConfig(), Artifact(str(tmp_path / "index")))
    assert figures == FIGURES
    folder = tmp_path / "index"
    by_label = {(name.of, name.corpus): Collection(folder, name) for name in collection_names(folder)}
    assert list(by_label) == [("images", ""), ("passages", "books"), ("passages", "guidelines")]
    images = by_label["images", ""]
    assert images.index.ids == ["im1", "im3"]
    row = {"uri": "/data/im3.png", "sha256": "im3im3", "diagnosis": "normal", "modality": "radiology"}
    assert images.take(["im3", "im4"]) == {"im3": row}
    guidelines = by_label["passages", "guidelines"]
    assert guidelines.nearest(np.array([[1.0, 0.0, 0.0]]), 1) == [[("d1#1", 1.0)]]
    assert guidelines.take(["d1#1"])["d1#1"]["text"] == "It blunts the angle."
    # The title is part of what BM25 reads, and "blunt" is the stem of "blunts".
    ((first, second), nobody) = guidelines.matching(["blunt effusion", "rib fracture"], 5)
    assert (first[0], second[0], nobody) == ("d1#1", "d1#0", [])
    assert [name for name, _ in by_label["passages", "books"].matching(["rib fracture"], 5)[0]] == ["d2#0"]


def test_a_small_index_has_the_bytes_of_faiss_own_flat_index(tmp_path: Path) -> None:
    import faiss

    build_index(sources(*tables(str(tmp_path))), IndexConfig(), Artifact(str(tmp_path / "index")))
    expected = faiss.IndexFlatIP(2)
    expected.add(np.array([[1.0, 0.0], [0.0, 1.0]], np.float32))
    content = (tmp_path / "index" / "images.faiss").read_bytes()
    assert content == faiss.serialize_index(expected).tobytes()
    assert (tmp_path / "index" / "images.ids.json").read_text() == '["im1", "im3"]'


def test_on_another_filesystem() -> None:
    from medmm_ray.engines.checkpoints import local_folder

    build_index(sources(*tables("memory://runs/index")), IndexConfig(), Artifact("memory://runs/index-test"))
    folder = local_folder("memory://runs/index-test")
    of_passages = [Collection(folder, name) for name in collection_names(folder) if name.of == "passages"]
    assert [collection.matching(["rib"], 5)[0][:1] != [] for collection in of_passages] == [True, False]


def test_no_images_and_no_passages_at_all(tmp_path: Path) -> None:
    nothing = [
        table_of(Image, to_arrow(Image, []), str(tmp_path / "images")),
        vector_table(str(tmp_path / "none"), IMAGES.slice(0, 0)),
        table_of(Passage, to_arrow(Passage, []), str(tmp_path / "passages")),
    ]
    figures = build_index(sources(*nothing), IndexConfig(), Artifact(str(tmp_path / "index")))
    assert (figures["images"], figures["passages"]) == (0.0, 0.0)
    for name in collection_names(tmp_path / "index"):
        collection = Collection(tmp_path / "index", name)
        assert collection.nearest(np.eye(2, dtype=np.float32), 3) == [[], []]
        assert collection.matching(["rib", ""], 3) == [[], []]


def test_bm25_of_shards_is_that_of_the_whole_corpus_by_the_library_itself(tmp_path: Path) -> None:
    """Words weigh by their rarity in the corpus, whatever the shard; the expected scores are bm25s's own."""
    import bm25s

    rng = np.random.default_rng(0)
    nouns = ["lung", "heart", "rib", "liver", "kidney", "spine", "brain", "knee", "eye", "skin"]
    texts = [" ".join(rng.choice(nouns, rng.integers(3, 12), p=np.arange(1, 11) / 55)) for _ in range(90)]
    rows = [passage(f"d{i:02}#0", "books", "", text, [1.0, 0.0]) for i, text in enumerate(texts)]
    shuffled = to_arrow(Passage, [rows[i] for i in rng.permutation(90)])
    table = table_of(Passage, shuffled, str(tmp_path / "passages"), rows_per_file=20)
    config = IndexConfig(shard_size=25)
    build_index(passage_sources(table), config, Artifact(str(tmp_path / "index")))
    (name,) = collection_names(tmp_path / "index")
    collection = Collection(tmp_path / "index", name)
    assert len(collection.index.shards) == 4
    library = bm25s.BM25(k1=config.bm25_k1, b=config.bm25_b, method="lucene")
    library.index(words_of(texts), show_progress=False)
    queries = ["lung and heart", "the skin of the knee", "spine spine brain"]
    for query, hits in zip(queries, collection.matching(queries, 20), strict=True):
        scores_N = library.get_scores(words_of([query])[0])
        order = sorted(range(90), key=lambda i: (-round(float(scores_N[i]), 5), i))[:20]
        assert [hit[0] for hit in hits] == [f"d{i:02}#0" for i in order]
        assert [hit[1] for hit in hits] == pytest.approx([float(scores_N[i]) for i in order], abs=2e-5)


def test_vectors_of_two_models_are_refused(tmp_path: Path) -> None:
    mixed = to_arrow(Vector, [vector("a", [1.0]), vector("b", [1.0, 0.0])])
    for rows_per_file in (1, 2):
        source = vector_source("images", vector_table(str(tmp_path / f"mixed{rows_per_file}"), mixed, rows_per_file))
        for shard_size in (1, 2):
            out = Artifact(str(tmp_path / f"index{rows_per_file}-{shard_size}"))
            with pytest.raises(TableError, match="widths \\[1, 2\\]"):
                build_index([source], IndexConfig(shard_size=shard_size), out)


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TableError, match="cannot write"):
        build_index(sources(*tables(str(tmp_path))), IndexConfig(), Artifact(str(tmp_path / "file" / "index")))


def test_shards_find_what_one_index_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = many(1000)
    table = vector_table(str(tmp_path / "vectors"), rows, rows_per_file=300)
    ranges: list[tuple[int, int]] = []

    def run(tasks: Sequence[Any]) -> list[BuiltShard]:
        ranges.extend((task.rows.first, task.rows.end) for task in tasks)
        return in_turn(tasks)

    # The whole table is in nobody's memory.
    monkeypatch.setattr(Table, "to_arrow", None)
    figures = build_index(
        [vector_source("images", table)], IndexConfig(shard_size=400), Artifact(str(tmp_path / "index")), run
    )
    assert ranges == [(0, 334), (334, 667), (667, 1000)]
    assert figures == {"images": 980.0, "images_shards": 3.0, "images_recall_at_10": 1.0}
    build_index([vector_source("images", table)], IndexConfig(), Artifact(str(tmp_path / "one")))
    sharded, single = Index.load(tmp_path / "index" / "images"), Index.load(tmp_path / "one" / "images")
    assert sorted(sharded.ids) == single.ids == sound_ids(rows)
    queries_QD = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    assert sharded.search(queries_QD, 12) == single.search(queries_QD, 12)


@pytest.mark.parametrize("kind", ["hnsw", "ivf_pq"])
def test_recall_is_measured_and_stated(kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = vector_table(str(tmp_path / "vectors"), many(22_000), rows_per_file=5000)
    config = IndexConfig(method=kind, shard_size=11_000)
    good = build_index([vector_source("images", table)], config, Artifact(str(tmp_path / "good")))
    assert (good["images"], good["images_shards"]) == (21_560.0, 2.0)
    assert 0.95 <= good["images_recall_at_10"] <= 1.0
    assert not caplog.records
    worst = config.model_copy(update={"search_effort": 1, "num_probes": 1, "rerank_factor": 1})
    worse = build_index([vector_source("images", table)], worst, Artifact(str(tmp_path / "worse")))
    assert 0.1 < worse["images_recall_at_10"] < good["images_recall_at_10"]
    if worse["images_recall_at_10"] < 0.95:
        assert "raise index.search_effort (hnsw) or index.num_probes" in caplog.text


def test_recall_counts_the_true_nearest_but_the_vector_itself() -> None:
    def built(name: str, neighbours: list[str], true_neighbours: list[str]) -> BuiltShard:
        ranked = [[(-1.0 + i / 100, item) for i, item in enumerate(names)] for names in (neighbours, true_neighbours)]
        return BuiltShard(name, "hnsw", 9, 2, [ranked[0]], [ranked[1]])

    assert recall_of(["a"], [built("images", ["a", "c"], ["a", "b", "c", "d"])]) == pytest.approx(1 / 3)
    two = [built("images", ["a", "b"], ["a", "b"]), built("images-1", ["z"], ["x", "y"])]
    assert recall_of(["a"], two) == pytest.approx(1 / 3)
    assert recall_of(["a"], [BuiltShard("images", "flat", 9, 2, [[]], [[]])]) == 1.0


def test_a_run_that_goes_on_builds_only_the_shards_that_are_missing(tmp_path: Path) -> None:
    rows = many(300)
    table = vector_table(str(tmp_path / "vectors"), rows)
    out, config = Artifact(str(tmp_path / "index")), IndexConfig(shard_size=100)

    def killed(tasks: Sequence[Any]) -> list[BuiltShard]:
        in_turn(tasks[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index([vector_source("images", table)], config, out, killed)
    with pytest.raises(ConfigError, match="no index can be read"):
        Index.load(tmp_path / "index" / "images")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "index").glob("*.faiss")}
    assert sorted(before) == ["images-1.faiss", "images.faiss"]
    figures = build_index([vector_source("images", table)], config, out)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "index").glob("*.faiss")}
    assert {name: after[name] for name in before} == before
    assert figures == {"images": 294.0, "images_shards": 3.0, "images_recall_at_10": 1.0}
    assert sorted(Index.load(tmp_path / "index" / "images").ids) == sound_ids(rows)
    assert not list((tmp_path / "index").glob("*.built.json"))


def extended(tmp_path: Path, rows: pa.Table, folder: Path, **settings: Any) -> dict[str, float]:
    table = vector_table(str(tmp_path / "more"), rows)
    config = IndexConfig(extends=str(folder), **settings)
    return build_index([vector_source("images", table)], config, Artifact(str(tmp_path / "extended")))


def test_new_vectors_go_into_a_shard_of_their_own(tmp_path: Path) -> None:
    rows = many(500)
    table = vector_table(str(tmp_path / "vectors"), rows.slice(0, 300))
    build_index([vector_source("images", table)], IndexConfig(shard_size=150), Artifact(str(tmp_path / "index")))
    figures = extended(tmp_path, rows, tmp_path / "index")
    assert figures == {"images": 490.0, "images_shards": 3.0, "images_recall_at_10": 1.0}
    for name in ("images.faiss", "images-1.faiss", "images.ids.json", "images-1.ids.json"):
        assert (tmp_path / "extended" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()
    new_ids = json.loads((tmp_path / "extended" / "images-2.ids.json").read_text())
    assert new_ids == sound_ids(rows.slice(300))
    build_index(
        [vector_source("images", vector_table(str(tmp_path / "all"), rows))],
        IndexConfig(),
        Artifact(str(tmp_path / "anew")),
    )
    queries_QD = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    anew = Index.load(tmp_path / "anew" / "images").search(queries_QD, 12)
    assert Index.load(tmp_path / "extended" / "images").search(queries_QD, 12) == anew


def test_nothing_new_is_a_copy(tmp_path: Path) -> None:
    rows = many(100)
    table = vector_table(str(tmp_path / "vectors"), rows)
    build_index([vector_source("images", table)], IndexConfig(), Artifact(str(tmp_path / "index")))
    assert extended(tmp_path, rows, tmp_path / "index")["images_shards"] == 1.0


def test_an_index_of_other_vectors_is_not_extended(tmp_path: Path) -> None:
    rows = many(100)
    table = vector_table(str(tmp_path / "vectors"), rows)
    build_index([vector_source("images", table)], IndexConfig(), Artifact(str(tmp_path / "index")))
    with pytest.raises(TableError, match="holds 98 images, of which 49 have no vector in this run"):
        extended(tmp_path, rows.filter(pa.array([name < "v000050" for name in rows["item_id"].to_pylist()])),
                 tmp_path / "index")  # fmt: skip
    turned = to_arrow(Vector, [vector(row["item_id"], row["vector"][::-1], row["error"]) for row in rows.to_pylist()])
    with pytest.raises(TableError, match="another model made it"):
        build_index(
            [vector_source("images", vector_table(str(tmp_path / "turned"), turned))],
            IndexConfig(extends=str(tmp_path / "index")),
            Artifact(str(tmp_path / "again")),
        )


ENCODER = EncoderIdentity("minilm", "content:a", 8, "mean", max_tokens=254)


def by(encoder: EncoderIdentity, rows: pa.Table) -> pa.Table:
    """The rows as `encoder` would have made them."""
    names = [None if error else encoder.to_json() for error in rows["error"].to_pylist()]
    return rows.set_column(rows.column_names.index("encoder"), "encoder", pa.array(names, pa.string()))


def renumbered(rows: pa.Table) -> pa.Table:
    return rows.set_column(0, "item_id", pa.array([f"v{i}" for i in range(len(rows))]))


def test_what_made_a_table_is_what_its_rows_say(tmp_path: Path) -> None:
    renamed = replace(ENCODER, source="a copy")
    rows = pa.concat_tables([by(ENCODER, many(60)), by(renamed, many(120).slice(60)), many(121).slice(120)])
    identity = recorded_encoder(vector_table(str(tmp_path / "a"), renumbered(rows)))
    assert identity is not None
    assert identity.differences(ENCODER) == []
    assert recorded_encoder(vector_table(str(tmp_path / "b"), many(3))) is None
    other = by(replace(ENCODER, pooling="cls"), many(120)).slice(60)
    with pytest.raises(
        TableError, match=r"by 2 encoders, one of which has pooling '\w+' instead of '\w+': the model was"
    ):
        recorded_encoder(
            vector_table(str(tmp_path / "c"), renumbered(pa.concat_tables([by(ENCODER, many(60)), other])))
        )


def test_an_index_is_extended_with_the_encoder_that_made_it(tmp_path: Path) -> None:
    table = vector_table(str(tmp_path / "vectors"), many(100))
    made_by = IndexEncoders(images=ENCODER)
    build_index([vector_source("images", table)], IndexConfig(), Artifact(str(tmp_path / "index")), encoders=made_by)
    assert IndexEncoders.load(tmp_path / "index") == made_by
    config = IndexConfig(extends=str(tmp_path / "index"))
    again = Artifact(str(tmp_path / "again"))
    build_index([vector_source("images", table)], config, again, encoders=made_by)
    of_other = IndexEncoders(images=replace(ENCODER, weights="content:b"))
    with pytest.raises(ConfigError, match="weights 'content:b' instead of 'content:a'. Only an index of the same"):
        build_index([vector_source("images", table)], config, Artifact(str(tmp_path / "c")), encoders=of_other)


def test_the_estimate_of_a_million_images() -> None:
    sizes = Sizes(train_questions=9, test_questions=1, train_samples=1, test_samples=1, images=1_000_000)
    line = index_cost(IndexConfig(), sizes)
    assert (line.step, line.work) == ("index", "1,000,000 vectors, hnsw, 2 shards")
    assert line.stored == 1_000_000 * (512 * 4 + 2 * 16 * 4 + 20)
    assert index_cost(IndexConfig(method="ivf_pq"), sizes).stored == 1_000_000 * (512 * 4 + 64 + 8 + 20)
    few = Sizes(train_questions=9, test_questions=1, train_samples=1, test_samples=1, images=100)
    assert (index_cost(IndexConfig(), few).work, index_cost(IndexConfig(), few).stored) == (
        "100 vectors, flat, 1 shard",
        100 * (512 * 4 + 20),
    )


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_shards_are_built_over_ray(tmp_path: Path) -> None:
    rows = many(600)
    table = vector_table(str(tmp_path / "vectors"), rows)
    config = IndexConfig(shard_size=200, num_cpus=0.5)
    over = build_index([vector_source("images", table)], config, Artifact(str(tmp_path / "over")), over_ray)
    here = build_index([vector_source("images", table)], config, Artifact(str(tmp_path / "here")))
    assert over == here == {"images": 588.0, "images_shards": 3.0, "images_recall_at_10": 1.0}
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "over" / file.name).read_bytes() == file.read_bytes()
