"""The tasks of an index: one shard is read, built and written; or the words of some passages are counted."""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import read_file
from medmm_ray.data.row_ranges import RowRange
from medmm_ray.data.tables import Artifact, TableError, follow, write_file
from medmm_ray.engines.index import IndexConfig, Kind, Neighbour, Shard, Vectors
from medmm_ray.engines.index.collection import BM25, ROWS, save_rows
from medmm_ray.engines.index.lexical import CorpusStatistics, LexicalShard
from medmm_ray.engines.index.shard import kind_of
from medmm_ray.engines.placement import actor_placement
from medmm_ray.steps.index.sources import Source, read_texts, read_vectors, titled_texts

log = logging.getLogger("medmm_ray")
BUILT = ".built.json"  # written when a shard's files are there
RECALL_AT = 10


@dataclass(frozen=True)
class Sample:
    """Vectors of the table, by their ids, whose neighbours are compared."""

    ids: list[str] = field(default_factory=list)
    vectors_ND: Vectors = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class BuiltShard:
    """What a task says of the shard that it has written: `neighbours` of the sample, as the shard finds them, and the
    `true_neighbours`."""

    name: str
    kind: Kind
    num_vectors: int
    width: int
    neighbours: list[list[Neighbour]]
    true_neighbours: list[list[Neighbour]]


class Task(Protocol):
    """Work on some rows that runs anywhere."""

    @property
    def config(self) -> IndexConfig:
        """How it is to be done, and what it asks for."""

    def run(self) -> Any:
        """Do it."""


Run = Callable[[Sequence[Task]], list[Any]]


@dataclass(frozen=True)
class CountTask:
    """Counts the words of some passages of a corpus."""

    config: IndexConfig
    rows: RowRange

    def run(self) -> CorpusStatistics:
        """The statistics of these passages."""
        return CorpusStatistics.sum([CorpusStatistics.of(texts) for texts in read_texts(self.rows)])


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made in `out`: of `rows`, or as a copy of the shard `earlier` of the index `config.extends`.

    `statistics` are of the whole corpus; None where the shard is the corpus, or has no texts.
    """

    source: Source
    name: str
    out: Artifact
    config: IndexConfig
    num_in_all: int
    rows: RowRange
    earlier: str | None = None
    sample: Sample = Sample()
    statistics: CorpusStatistics | None = None

    def run(self) -> BuiltShard:
        """Build and write the shard, where it is not there yet."""
        marker = f"{self.out.path}/{self.name}{BUILT}"
        content = read_file(self.out.fs, marker)
        if content is not None:
            return _parsed(content)
        shard = self._shard()
        # All of a shard's files are there before its mark is: a task that is killed leaves no half.
        with tempfile.TemporaryDirectory() as folder:
            shard.save(Path(folder) / self.name)
            self._save_rows(shard.ids, Path(folder))
            _upload(Path(folder), self.out)
        neighbours, true_neighbours = self._neighbours(shard)
        built = BuiltShard(
            self.name,
            shard.kind,
            len(shard),
            shard.width,
            neighbours,
            true_neighbours,
        )
        write_file(self.out.fs, marker, json.dumps(asdict(built)).encode())
        return built

    def _shard(self) -> Shard:
        if self.earlier is not None:
            shard = Shard.load(earlier_folder(self.config) / self.earlier)
            _check_same_vectors(
                shard,
                self.sample,
                f"{self.config.extends}/{self.earlier}",
            )
            return shard
        ids, vectors_ND = read_vectors(self.rows, self.source.key)
        return Shard.build(
            ids,
            vectors_ND,
            kind_of(
                self.config,
                len(ids),
                self.num_in_all,
            ),
            self.config,
        )

    def _save_rows(
        self,
        ids: pa.Array,
        folder: Path,
    ) -> None:
        """What can be looked up of the shard's rows, and BM25 of their texts."""
        if not self.source.columns:
            return
        # Of this run's tables also where the vectors are copied: a file may have moved, a diagnosis been mended.
        rows = self.source.details_of(ids, self.rows)
        save_rows(rows, folder / f"{self.name}{ROWS}")
        if self.source.name.is_lexical:
            # Built anew for a copied shard: its words' weights are those of a corpus that has grown.
            texts = titled_texts(rows)
            lexical = LexicalShard.build(
                texts,
                self.statistics,
                self.config.bm25_k1,
                self.config.bm25_b,
            )
            lexical.save(folder / f"{self.name}{BM25}")

    def _neighbours(self, shard: Shard) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
        if not self.sample.ids or not len(shard):
            nobody: list[list[Neighbour]] = [[] for _ in self.sample.ids]
            return nobody, nobody
        # One more than are compared, as a vector is the nearest to itself.
        k = RECALL_AT + 1
        return shard.search(self.sample.vectors_ND, k), shard.exact().search(self.sample.vectors_ND, k)


def in_turn(tasks: Sequence[Task]) -> list[Any]:
    """Run the tasks one after the other in this process."""
    return [task.run() for task in tasks]


def over_ray(tasks: Sequence[Task]) -> list[Any]:
    """Run the tasks on the machines of the present Ray session; the task of a worker that died runs again."""
    import ray

    if not tasks:
        return []
    config = tasks[0].config
    run = ray.remote(_run).options(
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
    )
    return list(ray.get([run.remote(task) for task in tasks]))


def _run(task: Task) -> Any:
    return task.run()


def earlier_folder(config: IndexConfig) -> Path:
    """The folder of the index that is extended, on this machine's disk."""
    from medmm_ray.engines.checkpoints import local_folder

    assert config.extends is not None
    return local_folder(follow(config.extends))


def _check_same_vectors(
    shard: Shard,
    sample: Sample,
    name: str,
) -> None:
    """Raise `TableError` where the shard holds a vector of the sample's ids that is another one."""
    rows = pc.index_in(pa.array(sample.ids, pa.string()), shard.ids).to_pylist()
    for item_id, row, vector_D in zip(
        sample.ids,
        rows,
        sample.vectors_ND,
        strict=True,
    ):
        if row is not None and not np.allclose(
            shard.vector(row),
            vector_D,
            atol=1e-4,
        ):
            raise TableError(
                f"index.extends: {name} holds another vector of {item_id} than this run: another model made it; "
                "leave index.extends out"
            )


def _upload(folder: Path, out: Artifact) -> None:
    # FAISS and bm25s write local files alone; from there they go to any filesystem.
    try:
        for file in sorted(folder.rglob("*")):
            target = f"{out.path}/{file.relative_to(folder)}"
            if file.is_dir():
                out.fs.create_dir(target, recursive=True)
            else:
                pafs.copy_files(
                    str(file),
                    target,
                    source_filesystem=pafs.LocalFileSystem(),
                    destination_filesystem=out.fs,
                )
    except OSError as error:
        raise TableError(f"cannot write the index to {out.uri}: {error}") from error


def _parsed(content: bytes) -> BuiltShard:
    values = json.loads(content)
    for name in ("neighbours", "true_neighbours"):
        values[name] = [list(map(tuple, neighbours)) for neighbours in values[name]]
    return BuiltShard(**values)
