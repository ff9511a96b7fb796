"""One searchable collection of an index folder: vectors, what their rows are of, and for texts BM25.

Enters: what the index step wrote (`<stem>.faiss`, `<stem>.ids.json`, `<stem>.rows.arrow`, `<stem>.bm25` a shard, and
`collections.json` that lists them). Everything stays on the disk until it is looked at.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.index import SHARDS, Index, Vectors
from medmm_ray.engines.index.lexical import LexicalShard, words_of

COLLECTIONS = "collections.json"
ROWS, BM25 = ".rows.arrow", ".bm25"
ROWS_AT_ONCE = 4096  # of a batch of the file of rows
Masks = Sequence[NDArray[np.bool_]]
Hits = list[tuple[str, float]]
"""Ids and scores, best first."""


@dataclass(frozen=True)
class CollectionName:
    """A collection's place in the folder: `stem` of its files, what it is of, and the corpus of passages."""

    stem: str
    of: Literal["images", "passages"]
    corpus: str = ""
    is_lexical: bool = False


class Collection:
    """The shards of a collection, searched as one."""

    def __init__(
        self,
        folder: Path,
        name: CollectionName,
    ) -> None:
        self.name = name
        self.index = Index.load(folder / name.stem)
        self._stems = [str(folder / shard) for shard in json.loads((folder / f"{name.stem}{SHARDS}").read_text())]

    def __len__(self) -> int:
        return len(self.index)

    # Read when they are first asked for: a search of images has no use for BM25.
    @cached_property
    def rows(self) -> list[pa.Table]:
        """What each shard's rows are of, in the order of its ids."""
        return [load_rows(f"{stem}{ROWS}") for stem in self._stems]

    @cached_property
    def _lexical(self) -> list[LexicalShard]:
        return [LexicalShard.load(f"{stem}{BM25}") for stem in self._stems]

    def masks(self, is_allowed: Callable[[pa.Table], pa.ChunkedArray]) -> Masks:
        """For each shard which of its rows are allowed."""
        masks: list[NDArray[np.bool_]] = []
        for rows in self.rows:
            masks.append(np.asarray(is_allowed(rows).to_numpy(zero_copy_only=False), np.bool_))
        return masks

    def nearest(
        self,
        queries_QD: Vectors,
        k: int,
        masks: Masks | None = None,
    ) -> list[Hits]:
        """The `k` nearest of each query by their vectors."""
        ids, similarities = self.index.search(queries_QD, k, masks)
        return [
            list(zip(*hits, strict=True))
            for hits in zip(
                ids,
                similarities,
                strict=True,
            )
        ]

    def matching(
        self,
        queries: Sequence[str],
        k: int,
        masks: Masks | None = None,
    ) -> list[Hits]:
        """The `k` best of each query by BM25; those that share a word with it alone."""
        if not self.name.is_lexical or not queries:
            return [[] for _ in queries]
        # Cut into words and stemmed once, whatever the number of shards.
        words = words_of(queries)
        by_shard: list[list[list[tuple[float, str]]]] = []
        for i, (shard, lexical) in enumerate(
            zip(
                self.index.shards,
                self._lexical,
                strict=True,
            )
        ):
            ranked = lexical.search(
                words,
                k,
                masks[i] if masks is not None else None,
            )
            by_shard.append(
                [
                    _named(
                        shard.ids,
                        scores_K,
                        rows_K,
                    )
                    for scores_K, rows_K in ranked
                ]
            )
        hits: list[Hits] = []
        for neighbours in zip(*by_shard, strict=True):
            hits.append([(name, -negative) for negative, name in islice(merge(*neighbours), k)])
        return hits

    def take(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What the rows of some ids are of, by id; without those that the collection has not."""
        # Ids of all queries together: a shard is gone through once, which takes some milliseconds.
        wanted_ids = pa.array(sorted(set(ids)), pa.string())
        taken: dict[str, dict[str, Any]] = {}
        for shard, rows in zip(self.index.shards, self.rows, strict=True):
            places = pc.index_in(wanted_ids, shard.ids)
            is_here = pc.is_valid(places)
            names = wanted_ids.filter(is_here).to_pylist()
            taken |= dict(
                zip(
                    names,
                    rows.take(places.filter(is_here)).to_pylist(),
                    strict=True,
                )
            )
        return taken

    def vectors(self, ids: Iterable[str]) -> dict[str, Vectors]:
        """The vectors of some ids, by id; without those that the collection has not."""
        wanted_ids = pa.array(sorted(set(ids)), pa.string())
        vectors: dict[str, Vectors] = {}
        for shard in self.index.shards:
            for name, row in zip(
                wanted_ids.to_pylist(),
                pc.index_in(wanted_ids, shard.ids).to_pylist(),
                strict=True,
            ):
                if row is not None:
                    vectors[name] = shard.vector(row)
        return vectors


def _named(
    ids: pa.Array,
    scores_K: NDArray[np.float64],
    rows_K: NDArray[np.int64],
) -> list[tuple[float, str]]:
    return list(
        zip(
            (-scores_K).tolist(),
            ids.take(pa.array(rows_K)).to_pylist(),
            strict=True,
        )
    )


def collection_names(folder: Path) -> list[CollectionName]:
    """The collections of an index folder."""
    try:
        entries = json.loads((folder / COLLECTIONS).read_text())
        return [CollectionName(**entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"no index can be read at {folder}/{COLLECTIONS} ({error}); run the index step again"
        ) from error


def save_rows(rows: pa.Table, path: str | Path) -> None:
    """Write a shard's rows so that they can be looked at in place."""
    # Not compressed: then a mapped file is the table itself, and a row costs the pages that it lies on.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=ROWS_AT_ONCE)


def load_rows(path: str | Path) -> pa.Table:
    """The rows that `save_rows` wrote, mapped into memory."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"no rows can be read at {path} ({error}); run the index step again") from error
