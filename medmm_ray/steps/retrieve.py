"""Evidence for each question: documents near its text, and similar training images with their diagnoses.

Enters: the table questions, the vectors and the index of earlier steps. Leaves: one `Evidence` row a question, best
first. Reference images come from the training split only, and are never the question's own image or a duplicate of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from medmm_ray.config import digest, execution, identity
from medmm_ray.data.records import Evidence, RetrievedDocument, RetrievedImage, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.engines.index import Index, Vectors
from medmm_ray.engines.placement import GpuPlacement, actor_placement

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.data import Dataset

VERSION = 1  # of what a step makes: raise it when the same config makes something else
TRAIN = "train"  # the only split that reference images come from
IMAGE_COLUMNS = ["image_id", "uri", "sha256", "diagnosis", "split"]


class RetrieveConfig(GpuPlacement):
    """How much evidence a question gets."""

    num_documents: int = 5
    """Documents per question, most similar first; 0 for none."""
    num_images: int = 3
    """Reference images per question (3 to 5 are the published numbers); 0 for none."""
    duplicate_similarity: float = 0.9999
    """Cosine similarity from which a reference image counts as a duplicate of the question's own and is passed over."""
    batch_size: int = execution(256, ge=1)
    """Questions that one copy of the index looks up at a time."""
    num_actors: int = execution(1)
    """Most copies of the index that work at the same time."""
    num_cpus: float = execution(0.5)
    """Logical CPU cores one copy asks for."""
    num_gpus: float = execution(0.0)
    """GPUs that one copy holds; with FAISS for GPUs, flat and ivf_pq indexes are searched there."""


@dataclass(frozen=True)
class Library:
    """What retrieval looks things up in, as Arrow tables.

    `documents`: document_id, text. `images`: image_id, uri, sha256, diagnosis, split of *all* images. `query_vectors`
    and `image_vectors`: Vector rows.
    """

    documents: pa.Table
    images: pa.Table
    query_vectors: pa.Table
    image_vectors: pa.Table


def retrieve(
    ds: "Dataset",
    config: RetrieveConfig,
    library: Library,
    index_folder: str,
) -> "Dataset":
    """Question rows -> Evidence rows; the library is shared through the object store, once a node."""
    import ray
    from ray.data import ActorPoolStrategy

    # The object store holds them once a node, however many actors read them.
    references = [
        ray.put(library.documents),
        ray.put(library.images),
        ray.put(library.query_vectors),
        ray.put(library.image_vectors),
    ]
    return ds.map_batches(
        _RetrieveActor,
        fn_constructor_args=(config, references, index_folder),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
    )


class _RetrieveActor:
    def __init__(
        self,
        config: RetrieveConfig,
        tables: "Sequence[ObjectRef[pa.Table]]",
        index_folder: str,
    ) -> None:
        import ray

        self.retriever = Retriever(config, Library(*ray.get(list(tables))), index_folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.retriever.evidence(batch)


class Retriever:
    """Both indexes and the library, ready to look up batches of questions.

    Documents come from dense vectors alone; a lexical ranking would be fused with theirs in `evidence`, before the cut.
    """

    def __init__(
        self,
        config: RetrieveConfig,
        library: Library,
        index_folder: str,
    ) -> None:
        from medmm_ray.engines.checkpoints import local_folder

        folder = local_folder(index_folder)
        self.config = config
        self.config_hash = digest(identity(config))
        self.document_index = Index.load(folder / "documents")
        self.image_index = Index.load(folder / "images")
        # Texts stay in Arrow until a document is retrieved.
        document_ids = library.documents["document_id"].to_pylist()
        self.texts = dict(zip(document_ids, library.documents["text"], strict=True))
        self.images: dict[str, dict[str, Any]] = {}
        for row in library.images.select(IMAGE_COLUMNS).to_pylist():
            self.images[row["image_id"]] = row
        self.query_vectors = _Vectors(library.query_vectors)
        self.image_vectors = _Vectors(library.image_vectors)

    def evidence(self, questions: pa.Table) -> pa.Table:
        """Question rows -> Evidence rows. An image without a vector leaves its question with documents and an error."""
        rows = questions.select(["question_id", "image_ids", "error"]).to_pylist()
        faults: dict[int, str] = {}
        # Only what has a vector is looked up, by the question's place in the batch.
        texts: dict[int, Vectors] = {}
        pictures: dict[int, Vectors] = {}
        for i, row in enumerate(rows):
            if row["error"]:
                faults[i] = f"upstream: {row['error']}"
                continue
            try:
                if self.config.num_documents:
                    texts[i] = self.query_vectors.get(row["question_id"])
                if self.config.num_images and row["image_ids"]:
                    pictures[i] = self.image_vectors.get(row["image_ids"][0])
            except RowError as fault:
                faults[i] = str(fault)
        documents = nearest(self.document_index, texts, self.config.num_documents)
        eligible = {i: self._eligible(rows[i]["image_ids"]) for i in pictures}
        references = nearest(
            self.image_index,
            pictures,
            self.config.num_images,
            eligible,
        )
        evidence = []
        for i, row in enumerate(rows):
            evidence.append(
                Evidence(
                    question_id=row["question_id"],
                    config_hash=self.config_hash,
                    documents=list(starmap(self._document, documents.get(i, []))),
                    images=list(starmap(self._image, references.get(i, []))),
                    error=faults.get(i),
                )
            )
        return to_arrow(Evidence, evidence)

    def _eligible(self, question_image_ids: Sequence[str]) -> Callable[[str], bool]:
        """Which images may be references of a question with these images of its own."""
        hashes: set[str] = set()
        vectors: list[Vectors] = []
        for image_id in question_image_ids:
            if image_id in self.images:
                hashes.add(self.images[image_id]["sha256"])
            if image_id in self.image_vectors:
                vectors.append(self.image_vectors.get(image_id))
        vectors_ND = np.stack(vectors)

        def eligible(image_id: str) -> bool:
            image = self.images.get(image_id)
            if image is None or image["split"] != TRAIN:
                return False
            # The picture itself, under its own name or as a copy of the same bytes.
            if image_id in question_image_ids or image["sha256"] in hashes:
                return False
            # Or as a copy in other bytes (recompressed): nothing else is as near.
            similarities_N = vectors_ND @ self.image_vectors.get(image_id)
            return float(similarities_N.max()) < self.config.duplicate_similarity

        return eligible

    def _document(self, document_id: str, score: float) -> RetrievedDocument:
        text = self.texts[document_id].as_py()
        return RetrievedDocument(document_id=document_id, text=text, score=score)

    def _image(self, image_id: str, similarity: float) -> RetrievedImage:
        image = self.images[image_id]
        return RetrievedImage(
            image_id=image_id,
            uri=image["uri"],
            diagnosis=image["diagnosis"],
            similarity=similarity,
        )


def nearest(
    index: Index,
    queries: Mapping[int, Vectors],
    k: int,
    eligible: Mapping[int, Callable[[str], bool]] | None = None,
) -> dict[int, list[tuple[str, float]]]:
    """The `k` nearest (id, similarity) of each query that its `eligible` lets pass, best first.

    Fewer than `k` only where the index holds no more: a search that lost too many to `eligible` is widened.
    """
    hits: dict[int, list[tuple[str, float]]] = {i: [] for i in queries}
    pending = sorted(queries)
    # A few more than asked for, as the query's own image and its copies are among the nearest.
    fetch = k + 4
    while pending:
        queries_ND = np.stack([queries[i] for i in pending])
        ids, similarities = index.search(queries_ND, fetch)
        for i, names, values in zip(pending, ids, similarities, strict=True):
            passes = eligible[i] if eligible else _anything
            passing = [hit for hit in zip(names, values, strict=True) if passes(hit[0])]
            hits[i] = passing[:k]
        # The whole index was fetched: there is no more to find.
        if fetch >= len(index):
            break
        pending = [i for i in pending if len(hits[i]) < k]
        fetch *= 4
    return hits


def _anything(_: str) -> bool:
    return True


class _Vectors:
    """Vector rows by id."""

    def __init__(self, rows: pa.Table) -> None:
        ids = rows["item_id"].to_pylist()
        self._row = dict(zip(ids, range(len(ids)), strict=True))
        self._errors = rows["error"].to_pylist()
        self._vectors = rows["vector"].combine_chunks()

    def __contains__(self, item_id: str) -> bool:
        row = self._row.get(item_id)
        return row is not None and not self._errors[row]

    def get(self, item_id: str) -> Vectors:
        """The vector of an id; raises `RowError` where it has none."""
        row = self._row.get(item_id)
        if row is None:
            raise RowError("vector_missing", f"{item_id} has no row among the vectors; embed it first")
        error = self._errors[row]
        if error:
            raise RowError("upstream", f"no vector of {item_id}: {error}")
        # A view of Arrow's memory: a batch looks up thousands.
        vector_D: Vectors = self._vectors[row].values.to_numpy()
        if not (np.isfinite(vector_D).all() and vector_D.any()):
            raise RowError("not_finite", f"the vector of {item_id} holds NaN or infinity, or is 0; embed it again")
        return vector_D
