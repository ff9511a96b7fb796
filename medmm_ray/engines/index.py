"""Nearest neighbours of unit vectors (FAISS): exact inner product, or inverted lists where there are very many.

Enters: ids and vectors_ND. Leaves: for each query the k most similar ids, best first; equal similarities come in the
order of their ids, so that the same question finds the same evidence on every machine.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from medmm_ray.config import Config, ConfigError

Vectors = NDArray[np.float32]
# Similarities are compared after rounding to this many digits: sums in another order differ in the last bits.
TIE_DIGITS = 5


class IndexConfig(Config):
    """How vectors are searched."""

    exact_up_to: int = Field(200_000, ge=0)
    """Number of vectors up to which search is exact; above it, inverted lists are searched (IVF, approximate)."""
    num_probes: int = Field(32, ge=1)
    """Inverted lists that are searched for a query; more finds more of the true neighbours and takes longer."""


class Index:
    """A FAISS index, and the id of each of its rows. Made by `Index.build` or `Index.load`."""

    def __init__(self, ids: Sequence[str], faiss_index: Any) -> None:
        import faiss

        self._faiss = faiss
        self._index = faiss_index
        self.ids = list(ids)

    @classmethod
    def build(cls, ids: Sequence[str], vectors_ND: Vectors, config: IndexConfig | None = None) -> "Index":
        """An index of `vectors_ND`; raises ValueError where ids and rows do not match, an id repeats, or a vector is
        not finite or of length 0."""
        import faiss

        config = config or IndexConfig()
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        if len(ids) != len(vectors_ND) or len(set(ids)) != len(ids):
            raise ValueError(f"index: {len(ids)} ids ({len(set(ids))} distinct) for {len(vectors_ND)} vectors")
        _check("vectors", vectors_ND)
        # Rows in the order of their ids: the index is the same whatever the order that they arrive in.
        order = np.argsort(np.array(ids, dtype=np.str_), kind="stable")
        vectors_ND = vectors_ND[order]
        width = vectors_ND.shape[1]
        if len(ids) <= config.exact_up_to:
            index: Any = faiss.IndexFlatIP(width)
        else:
            # FAISS's advice for up to a million vectors: 4 to 16 times the root of their number.
            num_lists = max(1, int(4 * np.sqrt(len(ids))))
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(width),
                width,
                num_lists,
                faiss.METRIC_INNER_PRODUCT,
            )
            index.train(vectors_ND)
            index.nprobe = min(config.num_probes, num_lists)
        index.add(vectors_ND)
        return cls([ids[i] for i in order], index)

    @property
    def width(self) -> int:
        """Length of its vectors."""
        return int(self._index.d)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries_QD: Vectors, k: int) -> tuple[list[list[str]], list[list[float]]]:
        """Ids and similarities of the up to `k` nearest vectors of each query, best first.

        Raises ValueError where a query is of another width, not finite, or of length 0: it would be near to nothing, or
        to everything.
        """
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if not self.ids:
            return [[] for _ in queries_QD], [[] for _ in queries_QD]
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.width:
            raise ValueError(
                f"index holds vectors of width {self.width}, the queries have shape {queries_QD.shape}; "
                "embed both with the same model"
            )
        _check("queries", queries_QD)
        num_results = min(k, len(self.ids))
        similarities_QK, rows_QK = self._search_with_ties(queries_QD, num_results)
        names: list[list[str]] = []
        values: list[list[float]] = []
        for similarities_K, rows_K in zip(similarities_QK.tolist(), rows_QK.tolist(), strict=True):
            # FAISS fills up with row -1 where inverted lists hold fewer. Rows are in the order of their ids.
            neighbours: list[tuple[float, int]] = []
            for similarity, row in zip(similarities_K, rows_K, strict=True):
                if row >= 0:
                    neighbours.append((-similarity, row))
            neighbours.sort()
            nearest = neighbours[:num_results]
            names.append([self.ids[row] for _, row in nearest])
            values.append([-negative for negative, _ in nearest])
        return names, values

    def _search_with_ties(self, queries_QD: Vectors, num_results: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rounded similarities and rows of at least `num_results` neighbours, and of all that tie with the last."""
        # One more than asked for shows whether the last place is tied; then all that tie are needed to choose by id.
        num_fetched = min(num_results + 1, len(self.ids))
        while True:
            similarities_QK, rows_QK = self._index.search(queries_QD, num_fetched)
            rounded_QK = np.round(similarities_QK.astype(np.float64), TIE_DIGITS)
            tied_Q = (rounded_QK[:, num_results - 1] == rounded_QK[:, -1]) & (rows_QK[:, -1] >= 0)
            if num_fetched == len(self.ids) or not tied_Q.any():
                return rounded_QK, rows_QK
            num_fetched = min(2 * num_fetched, len(self.ids))

    def save(self, stem: str | Path) -> None:
        """Write ``<stem>.faiss`` and ``<stem>.ids.json``."""
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        self._faiss.write_index(self._index, f"{stem}.faiss")
        Path(f"{stem}.ids.json").write_text(json.dumps(self.ids))

    @classmethod
    def load(cls, stem: str | Path) -> "Index":
        """Read what `save` wrote."""
        import faiss

        try:
            index = faiss.read_index(f"{stem}.faiss")
            ids = json.loads(Path(f"{stem}.ids.json").read_text())
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"no index can be read at {stem}.faiss ({error}); run the index step again") from error
        if index.ntotal != len(ids):
            raise ConfigError(f"index {stem}: {index.ntotal} vectors but {len(ids)} ids; run the index step again")
        return cls(ids, index)


def _check(name: str, vectors_ND: Vectors) -> None:
    """Raise ValueError where a vector is not finite or of length 0."""
    broken = int((~np.isfinite(vectors_ND).all(axis=1)).sum())
    if broken:
        raise ValueError(f"index: {broken} of {len(vectors_ND)} {name} hold NaN or infinity; leave these rows out")
    empty = int((~vectors_ND.any(axis=1)).sum())
    if empty:
        raise ValueError(f"index: {empty} of {len(vectors_ND)} {name} have length 0; leave these rows out")
