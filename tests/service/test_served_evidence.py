"""`retrieve` in a request, through the real Serve application: dense and BM25 over several shards, as the step does."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as Picture

from medmm_ray.client import Client, rerank_request
from medmm_ray.data.records import Document, Image, Passage, Question, arrow_schema, to_arrow
from medmm_ray.data.tables import Artifact
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.evidence import EvidenceRequest
from medmm_ray.service.retrieval import RetrievalConfig
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.retrieve import RetrieveConfig
from tests.doubles.vector_tables import table_of, vector_table
from tests.service.web import LEFT, OPTIONS, RIGHT

TEXTS = (
    "An effusion blunts the costophrenic angle.",
    "Fluid in the pleura is an effusion; it lies lowest.",
    "A nodule is a round opacity.",
    "The heart is enlarged where it is wider than half of the chest.",
    "A pneumothorax shows no vessels beyond the edge of the lung.",
    "Consolidation fills the air spaces.",
    "The left lung has two lobes, the right lung three.",
    "A normal chest radiograph.",
)
QUESTIONS = ("Which side shows the effusion?", "Is the heart of the chest enlarged?", "Where is the nodule?")
WANTED = RetrieveConfig(num_documents=4, num_images=2)


def picture(folder: Path, number: int, split: str) -> Image:
    """A picture of random greys."""
    path = folder / f"{split}{number}.png"
    pixels = np.random.default_rng(number).integers(0, 40 * (number + 1), (40, 40, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(path)
    return Image(
        image_id=path.stem, uri=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), perceptual_hash="",
        width=40, height=40, split=split, modality="radiology", diagnosis=f"finding {number}", annotation="",
    )  # fmt: skip


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_evidence_of_the_service_is_that_of_the_step_and_is_scored_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmm_ray.engines.encoder import ImageEncoder
    from medmm_ray.engines.image_tower import load_preprocess
    from medmm_ray.engines.index import IndexConfig
    from medmm_ray.engines.text_encoder import TextEncoder
    from medmm_ray.service.deployment import running
    from medmm_ray.steps.embed import document_passages, image_vectors, query_encoder, question_queries
    from medmm_ray.steps.index import build_index, sources
    from medmm_ray.steps.retrieve import Retriever
    from medmm_ray.text import question_with_options
    from tests.doubles import tiny_reward_model
    from tests.steps.test_retrieve import lookup_tables

    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    model = tiny_reward_model.two_tower(tmp_path)
    tower, embed = str(tmp_path / "tower"), EmbedConfig()
    asked = [picture(tmp_path, number, "test") for number in range(len(QUESTIONS))]
    images = to_arrow(Image, [*asked, *(picture(tmp_path, number, "train") for number in range(5))])
    vectors = image_vectors(images, load_preprocess(tower), ImageEncoder(tower), 10_000)
    documents = [Document(document_id=f"d{i}", corpus="books", title="", text=text) for i, text in enumerate(TEXTS)]
    passages = document_passages(to_arrow(Document, documents), TextEncoder(tower), embed)["passages"]
    passage_rows = pa.Table.from_struct_array(passages.combine_chunks().flatten()).cast(arrow_schema(Passage))
    tables = [
        table_of(Image, images, f"{tmp_path}/t/images"),
        vector_table(f"{tmp_path}/t/vectors", vectors),
        table_of(Passage, passage_rows, f"{tmp_path}/t/passages"),
    ]
    index = tmp_path / "index"
    build_index(sources(*tables), IndexConfig(shard_size=3), Artifact(str(index)))
    assert len({path.name for path in index.rglob("*.bm25*")}) >= 3, "eight passages in shards of three"

    # The step, as a worker of it runs.
    questions = [
        Question(
            question_id=image.image_id, source="s", split="test", modality="radiology", difficulty="easy",
            question=text, options=OPTIONS, answer="left", answer_type="choice", image_ids=[image.image_id],
        )
        for text, image in zip(QUESTIONS, asked, strict=True)
    ]  # fmt: skip
    queries = question_queries(to_arrow(Question, questions), query_encoder(embed, tower), embed.query_options)
    queries = queries.append_column("image_ids", pa.array([[image.image_id] for image in asked]))
    queries = queries.append_column("modality", pa.array(["radiology"] * len(asked)))
    retriever = Retriever(WANTED, lookup_tables(tmp_path, vectors, images), str(index))
    offline = {row["question_id"]: row for row in retriever.evidence(queries).to_pylist()}
    found_by = [(row["dense"], row["lexical"]) for of_question in offline.values() for row in of_question["documents"]]
    assert any(None not in ranks for ranks in found_by), "both rankers took part"

    retrieval = RetrievalConfig(index=str(index), image_tower=tower, embed=embed, retrieve=WANTED, num_cpus=0.5)
    checkpoint = str(tmp_path / "two_tower")
    config = ServeConfig(model=checkpoint, port=0, num_cpus=0.5, access="loopback", retrieval=retrieval)
    wanted = EvidenceRequest(documents=WANTED.num_documents, images=WANTED.num_images)
    answers = {}
    with running(config) as url, Client(url) as service:
        for text, image in zip(QUESTIONS, asked, strict=True):
            request = rerank_request(text, OPTIONS, [RIGHT, LEFT], image=Path(image.uri).read_bytes())
            answers[image.image_id] = service.rerank(request.model_copy(update={"retrieve": wanted}))

    for text, image in zip(QUESTIONS, asked, strict=True):
        answer, expected = answers[image.image_id], offline[image.image_id]
        assert answer.evidence is not None
        found, similar = answer.evidence.documents, answer.evidence.images
        assert [document.passage_id for document in found] == [row["passage_id"] for row in expected["documents"]]
        assert [document.score for document in found] == pytest.approx([row["score"] for row in expected["documents"]])
        assert [of_answer.image_id for of_answer in similar] == [row["image_id"] for row in expected["images"]]
        similarities = [row["similarity"] for row in expected["images"]]
        assert [of_answer.similarity for of_answer in similar] == pytest.approx(similarities, abs=1e-5)
        # It stands where the step would put it: these are the scores with it, not those without.
        case = (question_with_options(text, OPTIONS), [RIGHT, LEFT])
        texts = [row["text"] for row in expected["documents"]]
        references = [Picture.open(row["uri"]) for row in expected["images"]]
        scores = model.score(*case, texts, Picture.open(image.uri), references)
        without = model.score(*case, (), Picture.open(image.uri))
        for solution, score, bare in zip(answer.solutions, scores, without, strict=True):
            probabilities = [step.probability for step in solution.steps]
            assert probabilities == pytest.approx(score.plus_probs, abs=1e-6)
            assert probabilities != pytest.approx(bare.plus_probs, abs=1e-4)
