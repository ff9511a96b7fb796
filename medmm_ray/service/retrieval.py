"""The index of a run behind the service: a deployment of its own, beside the scorer's replicas.

Enters: an index folder and the encoders that made its vectors. Leaves: `Found` for an `EvidenceQuery`, by the searches
of the `retrieve` step, so that evidence online and offline is the same.
"""

import asyncio
import hashlib
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from medmm_ray.config import Config, ConfigError, execution
from medmm_ray.data.records import RetrievedImage
from medmm_ray.engines.images import MAX_PIXELS, decode_image, read_bytes
from medmm_ray.service.evidence import EvidenceQuery, Found
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.retrieve import RetrieveConfig
from medmm_ray.text import question_with_options


class RetrievalConfig(Config):
    """The index that requests may search, and how."""

    index: str | None = execution(None)
    """Folder or URI of the index, such as <run>/index; required (in a recipe: the run's own by default)."""
    image_tower: str | None = execution(None)
    """Encoder that made the index's image vectors; required (in a recipe: the run's own by default)."""
    embed: EmbedConfig = execution(EmbedConfig())
    """How its passages became vectors: questions are read by the same encoder (in a recipe: its section `embed`)."""
    retrieve: RetrieveConfig = execution(RetrieveConfig())
    """How it is searched; num_documents and num_images are the most that a request may ask for (in a recipe: its
    section `retrieve`)."""
    num_replicas: Annotated[int, Field(ge=1)] = execution(1)
    """Copies of encoders and index."""
    num_cpus: Annotated[float, Field(ge=0)] = execution(1.0)
    """CPUs per copy."""


class EvidenceSearch:
    """One copy of the index with its encoders."""

    def __init__(self, config: RetrievalConfig) -> None:
        # Here, not above: a driver that starts the copies needs neither torch nor FAISS.
        from medmm_ray.engines.checkpoints import local_folder, resolve
        from medmm_ray.engines.encoder import ImageEncoder
        from medmm_ray.engines.image_tower import load_preprocess
        from medmm_ray.steps.embed import query_encoder
        from medmm_ray.steps.retrieve import load_search
        from medmm_ray.steps.retrieve.images import ReferenceSearch

        if config.index is None or config.image_tower is None:
            raise ConfigError("retrieval needs index and image_tower: retrieval={index: <run>/index, image_tower: ...}")
        folder, tower = local_folder(config.index), resolve(config.image_tower)
        self._config = config
        self._queries = query_encoder(config.embed, tower)
        self._passages = load_search(config.retrieve, folder)
        self._references = ReferenceSearch(config.retrieve, folder)
        self._preprocess = load_preprocess(tower)
        self._images = ImageEncoder(tower)
        self._check_encoders(folder)

    def _check_encoders(self, folder: Path) -> None:
        """Raise `ConfigError` where queries would be embedded by others than the index asks for."""
        from medmm_ray.engines.index.encoders import IndexEncoders

        recorded, name, settings = IndexEncoders.load(folder), str(self._config.index), self._config.retrieve
        if settings.searches_passage_vectors:
            advice = "Set retrieval.embed as the run that made the index has it (its recipe's section embed)"
            recorded.check("queries", self._queries.query_identity, name, advice)
        if settings.num_images:
            advice = "Name the image tower that the index was made with: retrieval.image_tower"
            recorded.check("images", self._images.identity, name, advice)

    async def find(self, query: EvidenceQuery) -> Found:
        """What the index holds for a query."""
        # In a thread: encoding and searching would keep the event loop from answering health checks.
        return await asyncio.to_thread(self._find, query)

    def _find(self, query: EvidenceQuery) -> Found:
        documents = []
        if query.num_documents:
            with_options = self._config.embed.query_options
            text = question_with_options(query.question, query.options) if with_options else query.question
            vectors_QD = self._queries.encode_queries([text])
            (documents,) = self._passages.search([text], vectors_QD, [query.modality])
        images = self._similar(query)[: query.num_images]
        return Found(
            documents[: query.num_documents],
            images,
            [read_bytes(image.uri) for image in images],
        )

    def _similar(self, query: EvidenceQuery) -> list[RetrievedImage]:
        """Training images similar to the question's, without itself and its copies."""
        from medmm_ray.steps.retrieve.images import OwnImages

        if not query.num_images or query.image is None:
            return []
        picture = decode_image(query.image, "image", MAX_PIXELS)
        pixels_N3HW = np.asarray(self._preprocess(picture), np.float32)[None]
        hashes = frozenset({hashlib.sha256(query.image).hexdigest()})
        own = OwnImages((), hashes, self._images.encode(pixels_N3HW))
        return self._references.search({0: own}, [query.modality])[0]
