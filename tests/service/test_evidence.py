"""Evidence in a request: from a scripted index over HTTP, and from a real (tiny) one."""

import asyncio
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image as Picture

from medmm_ray.config import ConfigError
from medmm_ray.data.records import Document, Image, Passage, RetrievedDocument, RetrievedImage, arrow_schema, to_arrow
from medmm_ray.service.evidence import EvidenceQuery, Found
from medmm_ray.service.retrieval import EvidenceSearch, RetrievalConfig
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.retrieve import RetrieveConfig
from tests.engines.test_weights import change_weights
from tests.service.web import LEFT, QUESTION, FakeModel, b64, body, client, png

PASSAGE = RetrievedDocument(document_id="d1", passage_id="d1#0", text="Angles blunt.", score=0.5, title="T", corpus="c")
SIMILAR = RetrievedImage(image_id="i1", uri="/secret/i1.png", diagnosis="effusion", similarity=0.9)
CONFIG = RetrievalConfig(index="i", image_tower="t", retrieve=RetrieveConfig(num_documents=2, num_images=1))


@dataclass
class Script:
    """An index that holds one passage and one image; notes what it was asked."""

    queries: list[EvidenceQuery] = field(default_factory=list)

    async def find(self, query: EvidenceQuery) -> Found:
        self.queries.append(query)
        return Found([PASSAGE], [SIMILAR][: query.num_images], [png()][: query.num_images])


def asked(script: Script, model: FakeModel, path: str = "/v1/rerank", **changes: Any) -> Any:
    web = client(model, evidence=script.find, retrieval=CONFIG)
    return web.post(path, json=body(**changes))


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score"])
def test_evidence_stands_behind_the_requests_own_and_is_told(path: str) -> None:
    script, model = Script(), FakeModel()
    image = b64(png(colour="white"))
    wanted = {"documents": 2, "images": 1, "modality": "radiology"}
    reply = asked(script, model, path, documents=["Mine."], image=image, retrieve=wanted)
    assert reply.status_code == 200
    evidence = reply.json()["evidence"]
    assert evidence["documents"] == [
        {"passage_id": "d1#0", "document_id": "d1", "corpus": "c", "title": "T", "text": "Angles blunt.", "score": 0.5}
    ]
    assert evidence["images"] == [{"image_id": "i1", "diagnosis": "effusion", "similarity": 0.9}]
    assert "secret" not in reply.text
    (query,) = script.queries
    assert (query.question, query.num_documents, query.num_images) == (QUESTION, 2, 1)
    assert (query.modality, query.image) == ("radiology", png(colour="white"))
    assert [call[2] for call in model.calls] == [2], "its own document and the one that was found"


def test_without_retrieve_nothing_is_looked_up() -> None:
    script = Script()
    empty: list[dict[str, Any]] = [{}, {"retrieve": None}, {"retrieve": {}}]
    for changes in empty:
        assert asked(script, FakeModel(), **changes).json()["evidence"] is None
    assert script.queries == []


@pytest.mark.parametrize(
    ("wanted", "status", "words"),
    [
        ({"documents": 3}, 413, "retrieve: 3 documents; at most 2 are looked up"),
        ({"images": 1}, 422, "retrieve: 1 similar images of none; send an image"),
        ({"documents": -1}, 422, "retrieve.documents: -1"),
        ({"pictures": 1}, 422, "known names: documents, images, modality"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(wanted: dict[str, int], status: int, words: str) -> None:
    script = Script()
    reply = asked(script, FakeModel(), retrieve=wanted)
    assert reply.status_code == status
    assert words in reply.json()["detail"]
    assert script.queries == []


def test_a_broken_image_is_refused_before_anything_is_looked_up() -> None:
    script = Script()
    for image in ("no base64!", b64(b"GIF89a broken")):
        reply = asked(script, FakeModel(), image=image, retrieve={"images": 1})
        assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid")
    assert script.queries == []


def test_without_an_index_evidence_is_refused() -> None:
    reply = client(FakeModel()).post("/v1/rerank", json=body(solutions=[LEFT], retrieve={"documents": 1}))
    assert reply.status_code == 422
    assert "retrieve: no index is served" in reply.json()["detail"]


# A real index


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> EvidenceSearch:
    from medmm_ray.data.tables import Artifact
    from medmm_ray.engines.encoder import ImageEncoder
    from medmm_ray.engines.image_tower import load_preprocess
    from medmm_ray.engines.index import IndexConfig
    from medmm_ray.engines.index.encoders import IndexEncoders
    from medmm_ray.engines.text_encoder import TextEncoder
    from medmm_ray.steps.embed import document_passages, image_vectors
    from medmm_ray.steps.index import build_index, recorded_encoder, sources
    from tests.doubles.clip_folders import write_native_clip
    from tests.doubles.vector_tables import table_of, vector_table

    folder = tmp_path_factory.mktemp("index")
    tower = str(write_native_clip(folder / "tower"))
    texts = [("d1", "Pleura", "the left effusion"), ("d2", "", "a normal chest"), ("d3", "", "a nodule")]
    rows = to_arrow(Document, [Document(document_id=i, corpus="books", title=t, text=x) for i, t, x in texts])
    passages = document_passages(rows, TextEncoder(tower), EmbedConfig())["passages"].combine_chunks().flatten()
    images = []
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 100))):
        path = folder / f"{name}.png"
        Picture.new("RGB", (40, 40), colour).save(path)
        images.append(
            Image(
                image_id=name, uri=str(path), sha256=_sha256(path), perceptual_hash="", width=40, height=40,
                split="train", modality="radiology", diagnosis=f"{name} lung", annotation="",
            )
        )  # fmt: skip
    vectors = image_vectors(to_arrow(Image, images), load_preprocess(tower), ImageEncoder(tower), 10_000)
    index = Artifact(str(folder / "built"))
    of_vectors = vector_table(f"{folder}/t/vectors", vectors)
    of_passages = table_of(
        Passage, pa.Table.from_struct_array(passages).cast(arrow_schema(Passage)), f"{folder}/t/passages"
    )
    encoders = IndexEncoders(
        recorded_encoder(of_vectors), recorded_encoder(of_passages), TextEncoder(tower).query_identity
    )
    of_images = table_of(Image, to_arrow(Image, images), f"{folder}/t/images")
    build_index(sources(of_images, of_vectors, of_passages), IndexConfig(), index, encoders=encoders)
    config = RetrievalConfig(
        index=str(folder / "built"),
        image_tower=tower,
        retrieve=RetrieveConfig(num_documents=2, num_images=2, dense_weight=0),
    )
    return EvidenceSearch(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_images": 0}, "looked for with queries by tower, and this is other: weights .*Set retrieval.embed"),
        (
            {"num_documents": 0},
            "images' vectors were made by tower, and this is other: weights .*retrieval.image_tower",
        ),
    ],
)
def test_an_index_of_another_model_of_the_same_width_is_not_served(
    settings: dict[str, Any], words: str, search: EvidenceSearch, tmp_path: Path
) -> None:
    other = shutil.copytree(str(search._config.image_tower), tmp_path / "other")
    change_weights(other, lambda w: {name: 2 * weight for name, weight in w.items()}, "open_clip_model.safetensors")
    changes = {"image_tower": str(other), "retrieve": RetrieveConfig(**settings)}
    with pytest.raises(ConfigError, match=words):
        EvidenceSearch(search._config.model_copy(update=changes))


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_real_index_gives_passages_and_similar_images_without_the_one_that_was_sent(search: EvidenceSearch) -> None:
    blue = Path(str(search._config.index)).parent / "blue.png"
    query = EvidenceQuery("effusion of the pleura", (), blue.read_bytes(), 1, 2, "")
    found = asyncio.run(search.find(query))
    assert [document.passage_id for document in found.documents] == ["d1#0"]
    assert [image.image_id for image in found.images] == ["red"], "its copy is no evidence"
    assert found.contents == [(blue.parent / "red.png").read_bytes()]
    nothing = asyncio.run(search.find(EvidenceQuery("effusion", (), None, 0, 0, "")))
    assert (list(nothing.documents), list(nothing.images)) == ([], [])
