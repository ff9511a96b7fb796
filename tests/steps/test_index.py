"""The two indexes hold what has a vector."""

from pathlib import Path

import pytest

from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Artifact, TableError
from medmm_ray.engines.index import Index, IndexConfig
from medmm_ray.steps.index import build_index


def vector(item_id: str, values: list[float], error: str | None = None) -> Vector:
    return Vector(item_id=item_id, vector=values, error=error)


IMAGES = to_arrow(
    Vector,
    [
        vector("im3", [0.0, 1.0]),
        vector("im1", [1.0, 0.0]),
        vector("im2", [], "image_empty: x"),
    ],
)
DOCUMENTS = to_arrow(Vector, [vector("d1", [0.0, 0.0, 1.0])])


def test_what_has_a_vector_is_indexed(tmp_path: Path) -> None:
    out = Artifact(str(tmp_path / "index"))
    figures = build_index(IMAGES, DOCUMENTS, IndexConfig(), out)
    assert figures == {"images": 2.0, "documents": 1.0}
    assert Index.load(tmp_path / "index" / "images").ids == ["im1", "im3"]
    assert Index.load(tmp_path / "index" / "documents").search(DOCUMENTS["vector"].to_pylist(), 1) == (
        [["d1"]],
        [[1.0]],
    )


def test_on_another_filesystem() -> None:
    import fsspec

    build_index(IMAGES, DOCUMENTS, IndexConfig(), Artifact("memory://runs/index-test"))
    names = sorted(Path(p).name for p in fsspec.filesystem("memory").ls("/runs/index-test", detail=False))
    assert names == ["documents.faiss", "documents.ids.json", "images.faiss", "images.ids.json"]


def test_no_images_at_all(tmp_path: Path) -> None:
    figures = build_index(IMAGES.slice(0, 0), DOCUMENTS, IndexConfig(), Artifact(str(tmp_path)))
    assert figures == {"images": 0.0, "documents": 1.0}


def test_vectors_of_two_models_are_refused(tmp_path: Path) -> None:
    mixed = to_arrow(Vector, [vector("a", [1.0]), vector("b", [1.0, 0.0])])
    with pytest.raises(TableError, match="widths \\[1, 2\\]"):
        build_index(mixed, DOCUMENTS, IndexConfig(), Artifact(str(tmp_path)))


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TableError, match="cannot write"):
        build_index(IMAGES, DOCUMENTS, IndexConfig(), Artifact(str(tmp_path / "file" / "index")))
