"""Nearest neighbours of unit vectors (FAISS): an index of one shard or many, each exact, a graph, or lists of codes.

Enters: ids and vectors_ND. Leaves: for each query the k most similar ids, best first; equal similarities come in the
order of their ids, so that the same question finds the same evidence on every machine. A search asks every shard and
merges what they give, which is exact: the k nearest of all are among the k nearest of each shard.
"""

import json
from collections.abc import Sequence
from heapq import merge
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.index.shard import IndexConfig, Kind, Neighbour, Shard, Vectors, check_vectors, kind_of

__all__ = [
    "SHARDS",
    "Index",
    "IndexConfig",
    "Kind",
    "Neighbour",
    "Shard",
    "Vectors",
    "merged",
    "shard_name",
    "shards_json",
]

SHARDS = ".shards.json"


class Index:
    """Shards that are searched as one. Made by `Index.build` or `Index.load`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)

    @classmethod
    def build(
        cls,
        ids: Sequence[str],
        vectors_ND: Vectors,
        config: IndexConfig | None = None,
    ) -> "Index":
        """An index of `vectors_ND` in one shard; raises what `Shard.build` raises."""
        config = config or IndexConfig()
        return cls(
            [
                Shard.build(
                    ids,
                    vectors_ND,
                    kind_of(
                        config,
                        len(ids),
                        len(ids),
                    ),
                    config,
                )
            ]
        )

    @property
    def ids(self) -> list[str]:
        """The ids of all vectors, shard by shard."""
        ids: list[str] = []
        for shard in self.shards:
            ids += shard.ids.to_pylist()
        return ids

    @property
    def width(self) -> int:
        """Length of its vectors."""
        return max(shard.width for shard in self.shards)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def search(
        self, queries_QD: Vectors, k: int, masks: Sequence[NDArray[np.bool_]] | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Ids and similarities of the up to `k` nearest vectors of each query, best first.

        `masks` say for each shard which of its rows are looked at. Raises ValueError where a query is of another width,
        not finite, or of length 0: it would be near to nothing, or to everything.
        """
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if not len(self):
            return [[] for _ in queries_QD], [[] for _ in queries_QD]
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.width:
            raise ValueError(
                f"index holds vectors of width {self.width}, the queries have shape {queries_QD.shape}; "
                "embed both with the same model"
            )
        check_vectors("queries", queries_QD)
        names: list[list[str]] = []
        values: list[list[float]] = []
        nearest: list[list[list[Neighbour]]] = []
        for i, shard in enumerate(self.shards):
            nearest.append(
                shard.search(
                    queries_QD,
                    k,
                    masks[i] if masks is not None else None,
                )
            )
        for neighbours in merged(nearest, k):
            names.append([name for _, name in neighbours])
            values.append([-negative for negative, _ in neighbours])
        return names, values

    def save(self, stem: str | Path) -> None:
        """Write the shards, ``<stem>.faiss`` and ``<stem>-<i>.faiss`` with their ids, and what they are."""
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        names = []
        for i, shard in enumerate(self.shards):
            names.append(shard_name(stem.name, i))
            shard.save(stem.parent / names[i])
        Path(f"{stem}{SHARDS}").write_text(shards_json(names))

    @classmethod
    def load(cls, stem: str | Path) -> "Index":
        """Read what `save` wrote."""
        stem = Path(stem)
        try:
            names = json.loads(Path(f"{stem}{SHARDS}").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"no index can be read at {stem}{SHARDS} ({error}); run the index step again") from error
        index = cls([Shard.load(stem.parent / name) for name in names])
        widths = {shard.width for shard in index.shards if len(shard)}
        if len(widths) > 1:
            raise ConfigError(f"index {stem}: shards of widths {sorted(widths)}; run the index step again")
        return index


def merged(by_shard: Sequence[Sequence[list[Neighbour]]], k: int) -> list[list[Neighbour]]:
    """The `k` nearest of each query, from those of each shard."""
    return [list(islice(merge(*neighbours), k)) for neighbours in zip(*by_shard, strict=True)]


def shard_name(stem: str, i: int) -> str:
    """Name of an index's shard `i`, from 0."""
    return f"{stem}-{i}" if i else stem


def shards_json(names: Sequence[str]) -> str:
    """The content of the file that lists an index's shards."""
    return json.dumps(list(names))
