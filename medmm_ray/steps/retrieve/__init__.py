"""Evidence for each question: passages for its query, and similar training images with their diagnoses.

Enters: the tables queries, questions, images and image_vectors, and the index. Leaves: one `Evidence` row a question,
best first. A worker holds the index as it lies on the disk, and of the tables the rows of its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from medmm_ray.config import ConfigError, digest, identity
from medmm_ray.data.records import Evidence, RetrievedDocument, RetrievedImage, to_arrow
from medmm_ray.data.sorted_rows import SortedRows
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.index import Vectors
from medmm_ray.engines.placement import actor_placement
from medmm_ray.steps.retrieve.config import RetrieveConfig
from medmm_ray.steps.retrieve.images import OwnImages, ReferenceSearch
from medmm_ray.steps.retrieve.passages import Count, PassageSearch, Reranking

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["VERSION", "PassageSearch", "RetrieveConfig", "Retriever", "Tables", "load_search", "retrieve"]

VERSION = 2  # of what a step makes: raise it when the same config makes something else


@dataclass(frozen=True)
class Tables:
    """What of other tables is looked up, on storage that all machines see.

    `questions`: question_id, image_ids, modality. `image_vectors`: item_id, vector, error. `images`: image_id, sha256.
    """

    questions: SortedRows
    image_vectors: SortedRows
    images: SortedRows


def retrieve(
    ds: "Dataset",
    config: RetrieveConfig,
    tables: Tables,
    index_folder: str,
) -> "Dataset":
    """Query rows -> Evidence rows."""
    from ray.data import ActorPoolStrategy

    # A query's own table holds its text and vector; of its question these two are needed.
    ds = attach(ds, tables.questions, "question_id", ["image_ids", "modality"])
    return ds.map_batches(
        _RetrieveActor,
        fn_constructor_args=(config, tables, index_folder),
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
        tables: Tables,
        index_folder: str,
    ) -> None:
        self.retriever = Retriever(config, tables, index_folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.retriever.evidence(batch)


def load_search(config: RetrieveConfig, folder: Path) -> PassageSearch:
    """The passages of an index folder with the models that the config names."""
    if config.token_budget is not None and config.budget_model is None:
        raise ConfigError(
            f"retrieve.token_budget={config.token_budget} is counted by a model's tokens; name it as "
            "retrieve.budget_model=<the policy's or reward model's folder or hub id>"
        )
    return PassageSearch(config, folder, _reranker(config), _count(config))


def _reranker(config: RetrieveConfig) -> Reranking | None:
    from medmm_ray.engines.cross_encoder import CrossEncoder

    if config.reranker is None:
        return None
    device = "cuda" if config.num_gpus else "cpu"
    return CrossEncoder(
        config.reranker,
        device,
        config.reranker_tokens,
        config.reranker_batch_size,
    )


def _count(config: RetrieveConfig) -> Count | None:
    from medmm_ray.engines.checkpoints import resolve
    from medmm_ray.engines.pretrained import load_tokenizer

    if config.budget_model is None:
        return None
    tokenizer: Any = load_tokenizer(resolve(config.budget_model))
    return lambda text: len(
        tokenizer(
            text,
            add_special_tokens=False,
            verbose=False,
        )["input_ids"]
    )


class Retriever:
    """The index and its tables, ready to look up batches of questions."""

    def __init__(
        self,
        config: RetrieveConfig,
        tables: Tables,
        index_folder: str,
    ) -> None:
        from medmm_ray.engines.checkpoints import local_folder

        folder = local_folder(index_folder)
        self.config = config
        self.config_hash = digest(identity(config))
        self.tables = tables
        self.passages = load_search(config, folder) if config.num_documents else None
        self.references = ReferenceSearch(config, folder) if config.num_images else None

    def evidence(self, queries: pa.Table) -> pa.Table:
        """Query rows with their questions' image_ids and modality -> Evidence rows.

        An image without a vector leaves its question with documents and an error.
        """
        if not queries.num_rows:  # an empty block has no columns
            return to_arrow(Evidence, [])
        rows = queries.to_pylist()
        faults: dict[int, str] = {}
        documents = self._documents(rows, faults)
        references = self._references(rows, faults)
        evidence: list[Evidence] = []
        for i, row in enumerate(rows):
            evidence.append(
                Evidence(
                    question_id=row["question_id"],
                    config_hash=self.config_hash,
                    documents=documents.get(i, []),
                    images=references.get(i, []),
                    error=faults.get(i),
                )
            )
        return to_arrow(Evidence, evidence)

    def _documents(
        self, rows: Sequence[Mapping[str, Any]], faults: dict[int, str]
    ) -> dict[int, list[RetrievedDocument]]:
        """The passages of each query, by its place in the batch; faults are noted."""
        if self.passages is None:
            return {}
        sound: dict[int, Vectors] = {}
        for i, row in enumerate(rows):
            try:
                sound[i] = _vector(row["question_id"], row)
            except RowError as fault:
                faults[i] = str(fault)
        if not sound:
            return {}
        texts = [rows[i]["text"] for i in sound]
        modalities = [rows[i]["modality"] or "" for i in sound]
        passages = self.passages.search(
            texts,
            np.stack(list(sound.values())),
            modalities,
        )
        return dict(zip(sound, passages, strict=True))

    def _references(
        self,
        rows: Sequence[Mapping[str, Any]],
        faults: dict[int, str],
    ) -> dict[int, list[RetrievedImage]]:
        if self.references is None:
            return {}
        # The batch's own images alone are read; an image of the index is known by the index.
        image_ids: set[str] = set()
        for row in rows:
            image_ids.update(row["image_ids"] or ())
        vectors = {row["item_id"]: row for row in self.tables.image_vectors.rows_of(image_ids).to_pylist()}
        hashes = self.tables.images.rows_of(image_ids)
        sha256 = dict(
            zip(
                hashes["image_id"].to_pylist(),
                hashes["sha256"].to_pylist(),
                strict=True,
            )
        )
        own: dict[int, OwnImages] = {}
        for i, row in enumerate(rows):
            if i in faults or not row["image_ids"]:
                continue
            try:
                own[i] = _own_images(row["image_ids"], vectors, sha256)
            except RowError as fault:
                faults[i] = str(fault)
        return self.references.search(own, [row["modality"] or "" for row in rows])


def _own_images(
    image_ids: Sequence[str], vectors: Mapping[str, Mapping[str, Any]], sha256: Mapping[str, str]
) -> OwnImages:
    """A question's images; `RowError` where the first has no vector. Others without one are known by name and bytes."""
    # The first is what is searched by; of the others duplicates are to be known.
    own_vectors = [_vector(image_ids[0], vectors.get(image_ids[0]))]
    for image_id in image_ids[1:]:
        row = vectors.get(image_id)
        if row is not None and not row["error"]:
            own_vectors.append(_vector(image_id, row))
    hashes = frozenset(sha256[image_id] for image_id in image_ids if image_id in sha256)
    return OwnImages(tuple(image_ids), hashes, np.stack(own_vectors))


def _vector(item_id: str, row: Mapping[str, Any] | None) -> Vectors:
    """The vector of a row; `RowError` where it has none."""
    if row is None:
        raise RowError("vector_missing", f"{item_id} has no row among the vectors; embed it first")
    error = row["error"]
    if error:
        raise RowError("upstream", f"no vector of {item_id}: {error}")
    # Tables of other versions or hands may hold what the embedding step would have refused.
    vector_D = np.array(row["vector"], np.float32)
    if not (np.isfinite(vector_D).all() and vector_D.any()):
        raise RowError("not_finite", f"the vector of {item_id} holds NaN or infinity, or is 0; embed it again")
    return vector_D
