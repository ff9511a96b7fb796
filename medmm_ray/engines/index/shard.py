"""One shard of an index: a FAISS index of some vectors, and the id of each of its rows.

Q queries, N vectors, D their width, K neighbours.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from medmm_ray.config import ConfigError, execution
from medmm_ray.engines.placement import GpuPlacement

Vectors = NDArray[np.float32]
Kind = Literal["flat", "hnsw", "ivf_pq"]
Neighbour = tuple[float, str]
"""Negative similarity and id: sorted, the most similar is first, and equal ones come in the order of their ids."""
# Similarities are compared after rounding to this many digits: sums in another order differ in the last bits.
TIE_DIGITS = 5
FEWEST_TO_TRAIN = 9_984  # FAISS wants 39 vectors for each of a code's 256 values
CODE_BITS = 8
GPU_MAX_K = 2048  # FAISS on a GPU gives no more neighbours
LINK_BYTES = 4
SELECTIVE = 0.1  # of a shard's rows: a graph or lists lose most of their neighbours to a filter that lets fewer pass
ADDED_AT_ONCE = 65_536
TRAINED_PER_LIST = 64  # a quarter of FAISS's default: as many neighbours found, in a tenth of the time


class IndexConfig(GpuPlacement):
    """How vectors are searched."""

    method: Literal["auto", "flat", "hnsw", "ivf_pq"] = "auto"
    """flat compares a query with every vector. hnsw follows a graph of neighbours, which is fastest and keeps whole
    vectors at hand. ivf_pq reads short codes in the nearest of many lists and compares the best exactly, so that most
    of what it reads is small. auto takes the one or the other by the number of vectors; a shard of fewer than 9,984 is
    always flat."""
    exact_up_to: int = Field(200_000, ge=0)
    """Number of vectors up to which auto is flat."""
    graph_up_to: int = Field(2_000_000, ge=0)
    """Number of vectors up to which auto is hnsw; above it, ivf_pq."""
    shard_size: int = Field(500_000, ge=1)
    """Most vectors of one shard: what a task reads, holds (about 2.5 times the vectors' bytes) and builds."""
    extends: str | None = None
    """An index folder of an earlier run whose shards are taken as they are: only vectors that it lacks are built, into
    new shards. All that it holds must be among the vectors, made by the same model."""
    graph_links: int = Field(16, ge=2)
    """Neighbours of a vector in hnsw's graph (twice as many in its lowest layer)."""
    build_effort: int = Field(40, ge=1)
    """Candidates that hnsw looks at for a vector's neighbours while it builds; FAISS's own default."""
    search_effort: int = Field(96, ge=1)
    """Candidates that hnsw looks at for a query; more finds more of the true neighbours and takes longer."""
    num_probes: int = Field(32, ge=1)
    """Lists that ivf_pq reads for a query; more finds more of the true neighbours and takes longer."""
    rerank_factor: int = Field(10, ge=1)
    """Vectors that ivf_pq compares exactly for each neighbour that is asked for."""
    num_cpus: float = execution(1.0)
    """Logical CPU cores that the building of one shard asks for."""
    bm25_k1: float = Field(1.2, ge=0)
    """How much a word that comes again adds to a passage's BM25 score; Lucene's default."""
    bm25_b: float = Field(0.75, ge=0, le=1)
    """How much BM25 holds a passage's length against it; Lucene's default."""
    num_gpus: float = execution(0.0)
    """GPUs that the building of one shard holds; with FAISS for GPUs, lists are found there."""


def kind_of(
    config: IndexConfig,
    num_in_shard: int,
    num_in_all: int,
) -> Kind:
    """The kind of a shard, by its vectors and those of the whole index."""
    if config.method == "flat" or num_in_shard < FEWEST_TO_TRAIN:
        return "flat"
    if config.method != "auto":
        return config.method
    if num_in_all <= config.exact_up_to:
        return "flat"
    return "hnsw" if num_in_all <= config.graph_up_to else "ivf_pq"


def num_codes(width: int) -> int:
    """Bytes of a vector's code in ivf_pq: at most 64, each for the same number of values, 4 or more."""
    return max(number for number in range(1, 65) if width % number == 0 and 4 * number <= max(width, 4))


def vector_bytes(
    kind: Kind,
    width: int,
    links: int,
) -> int:
    """Bytes that a shard stores of one vector."""
    bytes_of_kind = {"flat": 0, "hnsw": 2 * links * LINK_BYTES, "ivf_pq": num_codes(width) + 8}
    return 4 * width + bytes_of_kind[kind]


@dataclass(frozen=True)
class Shard:
    """A FAISS index and the ids of its rows, in ascending order; made by `Shard.build` or `Shard.load`."""

    ids: pa.Array
    faiss_index: Any
    on_gpus: Any = None
    """The same on the GPUs of this process, where FAISS has any."""
    holder: Any = None
    """The index whose memory the vectors lie in, where it is another."""

    @classmethod
    def build(
        cls,
        ids: Sequence[str],
        vectors_ND: Vectors,
        kind: Kind,
        config: IndexConfig,
    ) -> "Shard":
        """A shard of `vectors_ND`; raises ValueError where ids and rows do not match, an id repeats, or a vector is
        not finite or of length 0."""
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        if len(ids) != len(vectors_ND) or len(set(ids)) != len(ids):
            raise ValueError(f"index: {len(ids)} ids ({len(set(ids))} distinct) for {len(vectors_ND)} vectors")
        check_vectors("vectors", vectors_ND)
        # Rows in the order of their ids: the index is the same whatever the order that they arrive in.
        order = np.argsort(np.array(ids, dtype=np.str_), kind="stable")
        index = _empty(kind, vectors_ND.shape[1], len(ids), config)
        if kind == "ivf_pq":
            _train(index, vectors_ND, order)
        for first in range(
            0,
            len(ids),
            ADDED_AT_ONCE,
        ):  # sorted a few at a time: no second copy of all
            index.add(vectors_ND[order[first : first + ADDED_AT_ONCE]])
        return cls(pa.array([ids[i] for i in order], pa.string()), index)

    @property
    def kind(self) -> Kind:
        """Its kind, by the class of the FAISS index."""
        import faiss

        if isinstance(self.faiss_index, faiss.IndexHNSW):
            return "hnsw"
        return "ivf_pq" if isinstance(self.faiss_index, faiss.IndexRefine) else "flat"

    @property
    def width(self) -> int:
        """Length of its vectors."""
        return int(self.faiss_index.d)

    def __len__(self) -> int:
        return len(self.ids)

    def exact(self) -> "Shard":
        """The same vectors, searched exactly; they are not copied."""
        import faiss

        if self.kind == "flat":
            return self
        index = self.faiss_index
        storage = index.storage if self.kind == "hnsw" else index.refine_index
        return Shard(self.ids, faiss.downcast_index(storage), holder=index)

    def vector(self, row: int) -> Vectors:
        """The vector of a row."""
        vector_D: Vectors = self.exact().faiss_index.reconstruct(row)
        return vector_D

    def search(
        self,
        queries_QD: Vectors,
        k: int,
        mask_N: "NDArray[np.bool_] | None" = None,
    ) -> list[list[Neighbour]]:
        """The up to `k` nearest vectors of each query, best first, equal similarities in the order of their ids.

        With `mask_N` only rows for which it is true are looked at.
        """
        num_allowed = len(self) if mask_N is None else int(mask_N.sum())
        num_results = min(k, num_allowed)
        if not num_results:
            return [[] for _ in queries_QD]
        searched = self
        if mask_N is not None and num_allowed < max(FEWEST_TO_TRAIN, len(self) * SELECTIVE):
            searched = self.exact()
        similarities_QK, rows_QK = searched._search_with_ties(
            queries_QD,
            num_results,
            num_allowed,
            mask_N,
        )
        return list(
            map(
                self._nearest,
                similarities_QK,
                rows_QK,
                [num_results] * len(queries_QD),
            )
        )

    def _nearest(
        self,
        similarities_K: NDArray[np.float64],
        rows_K: NDArray[np.int64],
        k: int,
    ) -> list[Neighbour]:
        # FAISS fills up with row -1 where it finds fewer. Rows are in the order of their ids.
        is_row = rows_K >= 0
        negative_K, rows_K = -similarities_K[is_row], rows_K[is_row]
        best = np.lexsort((rows_K, negative_K))[:k]
        names = self.ids.take(pa.array(rows_K[best])).to_pylist()
        return list(zip(negative_K[best].tolist(), names, strict=True))

    def _search_with_ties(
        self, queries_QD: Vectors, num_results: int, num_allowed: int, mask_N: "NDArray[np.bool_] | None"
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rounded similarities and rows of at least `num_results` neighbours, and of all that tie with the last."""
        # FAISS's GPU indexes know no filters, so that a search with one runs on the CPU.
        options = {} if mask_N is None else {"params": self._parameters(mask_N)}
        # One more than asked for shows whether the last place is tied; then all that tie are needed to choose by id.
        num_fetched = min(num_results + 1, num_allowed)
        while True:
            index = self._index_for(num_fetched) if mask_N is None else self.faiss_index
            similarities_QK, rows_QK = index.search(
                queries_QD,
                num_fetched,
                **options,
            )
            rounded_QK = _rounded(similarities_QK)
            tied_Q = (rounded_QK[:, num_results - 1] == rounded_QK[:, -1]) & (rows_QK[:, -1] >= 0)
            if num_fetched == num_allowed or not tied_Q.any():
                return rounded_QK, rows_QK
            num_fetched = min(2 * num_fetched, num_allowed)

    def _parameters(self, mask_N: NDArray[np.bool_]) -> Any:
        """FAISS's parameters of a search among some rows, with the effort that the index has."""
        faiss: Any = import_module("faiss")  # whose stubs know nothing of these parameters
        selector = faiss.IDSelectorBitmap(np.packbits(mask_N, bitorder="little"))
        if self.kind == "flat":
            return faiss.SearchParameters(sel=selector)
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self.faiss_index.hnsw.efSearch)
        lists = faiss.downcast_index(self.faiss_index.base_index)
        in_lists = faiss.SearchParametersIVF(sel=selector, nprobe=lists.nprobe)
        return faiss.IndexRefineSearchParameters(k_factor=self.faiss_index.k_factor, base_index_params=in_lists)

    def _index_for(self, k: int) -> Any:
        num_candidates = k * self.faiss_index.k_factor if self.kind == "ivf_pq" else k
        return self.faiss_index if self.on_gpus is None or num_candidates > GPU_MAX_K else self.on_gpus

    def save(self, stem: str | Path) -> None:
        """Write ``<stem>.faiss`` and ``<stem>.ids.json``."""
        import faiss

        faiss.write_index(self.faiss_index, f"{stem}.faiss")
        Path(f"{stem}.ids.json").write_text(json.dumps(self.ids.to_pylist()))

    @classmethod
    def load(cls, stem: str | Path) -> "Shard":
        """Read what `save` wrote; vectors, graph and codes stay on the disk until they are looked at."""
        import faiss

        try:
            index = faiss.read_index(f"{stem}.faiss", faiss.IO_FLAG_MMAP_IFC)
            ids = json.loads(Path(f"{stem}.ids.json").read_text())
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"no index can be read at {stem}.faiss ({error}); run the index step again") from error
        if index.ntotal != len(ids):
            raise ConfigError(f"index {stem}: {index.ntotal} vectors but {len(ids)} ids; run the index step again")
        return cls(pa.array(ids, pa.string()), index, _moved_to_gpus(index))


def _empty(
    kind: Kind,
    width: int,
    num_vectors: int,
    config: IndexConfig,
) -> Any:
    """A FAISS index of a kind, for so many vectors, without any."""
    import faiss

    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(
            width,
            config.graph_links,
            faiss.METRIC_INNER_PRODUCT,
        )
        graph.hnsw.efConstruction = config.build_effort
        graph.hnsw.efSearch = config.search_effort
        return graph
    # FAISS's advice for up to a million vectors: 4 to 16 times the root of their number.
    num_lists = int(4 * np.sqrt(num_vectors))
    lists = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width),
        width,
        num_lists,
        num_codes(width),
        CODE_BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    lists.nprobe = min(config.num_probes, num_lists)
    for clustering in (lists.cp, lists.pq.cp):
        clustering.niter, clustering.max_points_per_centroid = 10, TRAINED_PER_LIST
        clustering.min_points_per_centroid = 1  # no warnings: a shard has enough
    reranked = faiss.IndexRefineFlat(lists)
    reranked.k_factor = config.rerank_factor
    return reranked


def _train(
    index: Any,
    vectors_ND: Vectors,
    order: NDArray[np.int64],
) -> None:
    """Find the lists and codes of an ivf_pq index: the lists on all GPUs that FAISS has in this process."""
    import faiss

    lists: Any = faiss.downcast_index(index.base_index)
    num_trained = max(TRAINED_PER_LIST * lists.nlist, FEWEST_TO_TRAIN)
    sample_ND = vectors_ND[order[:: max(1, len(order) // num_trained)]]
    if faiss.get_num_gpus():
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.d))
        lists.clustering_index = on_gpus
        index.train(sample_ND)
        lists.clustering_index = None  # FAISS keeps no hold of it, and it ends with this function
    else:
        index.train(sample_ND)


def _moved_to_gpus(index: Any) -> Any:
    """The index on all GPUs that FAISS has in this process; None without, and for a graph, which cannot be moved."""
    import faiss

    if not faiss.get_num_gpus() or isinstance(index, faiss.IndexHNSW):
        return None
    if not isinstance(index, faiss.IndexRefine):
        return faiss.index_cpu_to_all_gpus(index)
    # The lists move; the best are still compared with the vectors on the disk, which a GPU may not hold.
    lists = faiss.index_cpu_to_all_gpus(faiss.downcast_index(index.base_index))
    reranked = faiss.IndexRefine(lists, index.refine_index)
    reranked.k_factor = index.k_factor
    return reranked


def _rounded(similarities_QK: Vectors) -> NDArray[np.float64]:
    """The similarities with `TIE_DIGITS` digits after the point; of dot products above 10 a digit less for each ten."""
    # By each value alone, so that shards, which see other values, round alike.
    values_QK = similarities_QK.astype(np.float64)
    magnitude_QK = np.floor(np.log10(np.maximum(np.abs(values_QK), 1)))
    scale_QK = 10.0**magnitude_QK
    rounded_QK: NDArray[np.float64] = np.round(values_QK / scale_QK, TIE_DIGITS) * scale_QK
    return rounded_QK


def check_vectors(name: str, vectors_ND: Vectors) -> None:
    """Raise ValueError where a vector is not finite or of length 0."""
    broken = int((~np.isfinite(vectors_ND).all(axis=1)).sum())
    if broken:
        raise ValueError(f"index: {broken} of {len(vectors_ND)} {name} hold NaN or infinity; leave these rows out")
    empty = int((~vectors_ND.any(axis=1)).sum())
    if empty:
        raise ValueError(f"index: {empty} of {len(vectors_ND)} {name} have length 0; leave these rows out")
