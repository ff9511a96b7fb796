"""Reference images for a question's image: similar ones of the training split, never its own or a duplicate of it.

Enters: the vectors and hashes of questions' own images. Leaves: for each question the nearest references.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from medmm_ray.data.records import RetrievedImage
from medmm_ray.engines.index import Vectors
from medmm_ray.engines.index.collection import Collection, Hits, Masks, collection_names
from medmm_ray.steps.retrieve.config import RetrieveConfig

SPARE = 4  # more than asked for, as the query's own image and its copies are among the nearest


@dataclass(frozen=True)
class OwnImages:
    """The images of one question: ids, hashes of their bytes and vectors, the first one's first."""

    image_ids: tuple[str, ...]
    sha256: frozenset[str]
    vectors_ND: Vectors


class ReferenceSearch:
    """The images of an index folder, ready to be looked up."""

    def __init__(
        self,
        config: RetrieveConfig,
        folder: Path,
    ) -> None:
        self.config = config
        # An index has one collection of images, empty where there are none.
        (name,) = [name for name in collection_names(folder) if name.of == "images"]
        self.collection = Collection(folder, name)
        self._masks: dict[str, Masks | None] = {}

    def search(
        self,
        questions: Mapping[int, OwnImages],
        modalities: Sequence[str],
    ) -> dict[int, list[RetrievedImage]]:
        """The references of each question (by its place among `modalities`), most similar first."""
        # Questions of one modality share what filters the images.
        results: dict[int, list[RetrievedImage]] = {}
        for modality in sorted({modalities[i] for i in questions}):
            of_modality = {i: own for i, own in questions.items() if modalities[i] == modality}
            queries = {i: own.vectors_ND[0] for i, own in of_modality.items()}

            def eligible(
                i: int,
                hits: Hits,
                of_modality: Mapping[int, OwnImages] = of_modality,
            ) -> Hits:
                return self._without_own(of_modality[i], hits)

            references = nearest(
                self.collection,
                queries,
                self.config.num_images,
                eligible,
                self._mask(modality),
            )
            results |= {i: self._images(hits) for i, hits in references.items()}
        return results

    def _mask(self, modality: str) -> Masks | None:
        if not self.config.same_modality:
            return None
        if modality not in self._masks:
            self._masks[modality] = self.collection.masks(lambda rows: pc.equal(rows["modality"], modality))
        return self._masks[modality]

    def _without_own(
        self,
        own: OwnImages,
        hits: Hits,
    ) -> Hits:
        """The hits without the picture itself, under its own name, as the same bytes or in others (recompressed)."""
        names = [name for name, _ in hits]
        rows = self.collection.take(names)
        most_similar = dict(hits)
        if len(own.vectors_ND) > 1:  # nothing else is as near to any of the question's images
            for name, vector_D in self.collection.vectors(names).items():
                most_similar[name] = float((own.vectors_ND @ vector_D).max())
        passing: Hits = []
        for name, similarity in hits:
            # Named, byte for byte, or so similar that it can only be another copy of the same picture.
            is_own = name in own.image_ids or rows[name]["sha256"] in own.sha256
            if not is_own and most_similar[name] < self.config.duplicate_similarity:
                passing.append((name, similarity))
        return passing

    def _images(self, hits: Hits) -> list[RetrievedImage]:
        rows = self.collection.take(name for name, _ in hits)
        images: list[RetrievedImage] = []
        for name, similarity in hits:
            row: dict[str, Any] = rows[name]
            image = RetrievedImage(
                image_id=name,
                uri=row["uri"],
                diagnosis=row["diagnosis"],
                similarity=similarity,
            )
            images.append(image)
        return images


def nearest(
    collection: Collection,
    queries: Mapping[int, Vectors],
    k: int,
    eligible: Callable[[int, Hits], Hits],
    masks: Masks | None = None,
) -> dict[int, Hits]:
    """The `k` nearest of each query that `eligible` (its number, hits) lets pass, best first.

    Fewer than `k` only where there are no more. What may never come is left out by `masks`, so that a search is widened
    only where a query has many copies of its own.
    """
    results: dict[int, Hits] = {i: [] for i in queries}
    pending = sorted(queries)
    # Where all that may come were fetched there is no more to find.
    num_allowed = len(collection) if masks is None else sum(int(mask.sum()) for mask in masks)
    fetch = k + SPARE
    while pending:
        hits = collection.nearest(
            np.stack([queries[i] for i in pending]),
            fetch,
            masks,
        )
        for i, of_query in zip(pending, hits, strict=True):
            results[i] = eligible(i, of_query)[:k]
        if fetch >= num_allowed:
            break
        pending = [i for i in pending if len(results[i]) < k]
        fetch *= 4
    return results
