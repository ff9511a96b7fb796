"""The vectors of images and of documents become two FAISS indexes in one folder.

Enters: the tables image_vectors and document_vectors. Leaves: for each the files of its shards (``images.faiss``,
``images-1.faiss``, … and the ids of their rows, ``*.ids.json``) and their list, ``images.shards.json``. Rows with an
error are left out: what has no vector cannot be found.

A task reads only its shard's rows, builds and writes it; the driver holds none. A shard that is written is not built
again by a run that goes on with an interrupted one. With `IndexConfig.extends` the shards of an earlier index are
copied and only the vectors that it lacks are built, into shards of their own.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import read_file
from medmm_ray.data.row_ranges import RowRange
from medmm_ray.data.tables import Artifact, Table, TableError, follow, write_file
from medmm_ray.engines.index import (
    SHARDS,
    Index,
    IndexConfig,
    Kind,
    Neighbour,
    Shard,
    Vectors,
    merged,
    shard_name,
    shards_json,
)
from medmm_ray.engines.index.shard import kind_of, vector_bytes
from medmm_ray.engines.placement import actor_placement
from medmm_ray.estimate import Line, Sizes

log = logging.getLogger("medmm_ray")
VERSION = 2  # of what a step makes: raise it when the same config makes something else
COLUMNS = ["item_id", "vector", "error"]
BUILT = ".built.json"  # written when a shard's files are there
NUM_QUERIES = 256  # vectors whose neighbours are compared with the true ones
RECALL_AT = 10
LOW_RECALL = 0.95
WIDTH, ID_BYTES = 512, 20  # of an image's vector and id, for the estimate


def index_cost(config: IndexConfig, sizes: Sizes) -> Line:
    """The line of the images' index, built on CPUs; that of documents is small beside it."""
    kind = kind_of(config, min(sizes.images, config.shard_size), sizes.images)
    num_shards = -(-sizes.images // config.shard_size)
    return Line(
        step="index",
        work=f"{sizes.images:,} vectors, {kind}, {num_shards} shard{'s' if num_shards > 1 else ''}",
        stored=sizes.images * (vector_bytes(kind, WIDTH, config.graph_links) + ID_BYTES),
    )


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


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made in `out`: of `rows`, or as a copy of the shard `source` of the index `config.extends`."""

    stem: str
    name: str
    out: Artifact
    config: IndexConfig
    num_in_all: int
    rows: RowRange
    source: str | None = None
    sample: Sample = Sample()

    def run(self) -> BuiltShard:
        """Build and write the shard, where it is not there yet."""
        marker = f"{self.out.path}/{self.name}{BUILT}"
        content = read_file(self.out.fs, marker)
        if content is not None:
            return _parsed(content)
        shard = self._shard()
        _write(shard, self.name, self.out)
        neighbours, true_neighbours = self._neighbours(shard)
        built = BuiltShard(self.name, shard.kind, len(shard), shard.width, neighbours, true_neighbours)
        write_file(self.out.fs, marker, json.dumps(asdict(built)).encode())
        return built

    def _shard(self) -> Shard:
        if self.source is not None:
            shard = Shard.load(_earlier(self.config) / self.source)
            _check_same_vectors(shard, self.sample, f"{self.config.extends}/{self.source}")
            return shard
        ids, vectors_ND = read_vectors(self.rows)
        return Shard.build(ids, vectors_ND, kind_of(self.config, len(ids), self.num_in_all), self.config)

    def _neighbours(self, shard: Shard) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
        if not self.sample.ids or not len(shard):
            nobody: list[list[Neighbour]] = [[] for _ in self.sample.ids]
            return nobody, nobody
        # One more than are compared, as a vector is the nearest to itself.
        k = RECALL_AT + 1
        return shard.search(self.sample.vectors_ND, k), shard.exact().search(self.sample.vectors_ND, k)


Run = Callable[[Sequence[ShardTask]], Sequence[BuiltShard]]


def in_turn(tasks: Sequence[ShardTask]) -> list[BuiltShard]:
    """Run the tasks one after the other in this process."""
    return [task.run() for task in tasks]


def over_ray(tasks: Sequence[ShardTask]) -> list[BuiltShard]:
    """Run the tasks on the machines of the present Ray session; the task of a worker that died runs again."""
    import ray

    config = tasks[0].config
    run = ray.remote(ShardTask.run).options(
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
    )
    return list(ray.get([run.remote(task) for task in tasks]))


def build_index(
    tables: Mapping[str, Table], config: IndexConfig, out: Artifact, run: Run = in_turn
) -> dict[str, float]:
    """Build an index of each table of vectors in `out`'s folder (any filesystem that the tasks reach).

    Gives figures by the table's name: its vectors, shards and recall@10, the share of the 10 true nearest of a sample
    that the index finds. The image index holds every split; which images may become references is for retrieval to say.
    """
    out.prepare()
    tasks: list[ShardTask] = []
    for stem, table in tables.items():
        tasks += plan_shards(stem, table, config, out)
    built = run(tasks)
    figures: dict[str, float] = {}
    for stem in tables:
        shards = [shard for task, shard in zip(tasks, built, strict=True) if task.stem == stem]
        figures |= _finish(stem, shards, [task for task in tasks if task.stem == stem], out)
    return figures


def plan_shards(stem: str, table: Table, config: IndexConfig, out: Artifact) -> list[ShardTask]:
    """The tasks that make the index of a table: copies of the extended index's shards, then new ones."""
    rows = RowRange.whole(table)
    num_in_all = len(rows)
    sources: list[str] = []
    if config.extends is not None:
        sources, mask = _extended(stem, rows, config)
        rows = rows.only(mask)
    template = ShardTask(stem, stem, out, config, num_in_all, rows)
    tasks = [replace(template, source=source) for source in sources]
    num_new = -(-len(rows) // config.shard_size)
    if num_new or not tasks:
        tasks += [replace(template, rows=share) for share in rows.split(max(num_new, 1))]
    is_exact = kind_of(config, min(num_in_all, config.shard_size), num_in_all) == "flat" and not sources
    sample = Sample() if is_exact else draw_sample(RowRange.whole(table))
    return [replace(task, name=shard_name(stem, i), sample=sample) for i, task in enumerate(tasks)]


def _earlier(config: IndexConfig) -> Path:
    """The folder of the index that is extended, on this machine's disk."""
    from medmm_ray.engines.checkpoints import local_folder

    assert config.extends is not None
    return local_folder(follow(config.extends))


def _extended(stem: str, rows: RowRange, config: IndexConfig) -> tuple[list[str], NDArray[np.bool_]]:
    """The shards of an earlier index, and which rows have a vector that it lacks; of the rows only ids are read."""
    index = Index.load(_earlier(config) / stem)
    old_ids = pa.array(index.ids, pa.string())
    is_new: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    num_old = 0
    for group in rows.row_groups(["item_id", "error"]):
        is_old = pc.is_in(group["item_id"], old_ids)
        is_sound = pc.is_null(group["error"])
        num_old += pc.sum(pc.and_(is_old, is_sound)).as_py() or 0
        is_new.append(pc.and_not(is_sound, is_old).to_numpy(zero_copy_only=False).astype(np.bool_))
    if num_old != len(old_ids):
        raise TableError(
            f"index.extends: {config.extends} holds {len(old_ids)} {stem}, of which {len(old_ids) - num_old} have no "
            "vector in this run; only an index of some of the run's vectors can be extended: leave index.extends out"
        )
    names = [shard_name(stem, i) for i in range(len(index.shards))]
    return names, np.concatenate(is_new)


def _check_same_vectors(shard: Shard, sample: Sample, name: str) -> None:
    """Raise `TableError` where the shard holds a vector of the sample's ids that is another one."""
    rows = pc.index_in(pa.array(sample.ids, pa.string()), shard.ids).to_pylist()
    for item_id, row, vector_D in zip(sample.ids, rows, sample.vectors_ND, strict=True):
        if row is not None and not np.allclose(shard.vector(row), vector_D, atol=1e-4):
            raise TableError(
                f"index.extends: {name} holds another vector of {item_id} than this run: another model made it; "
                "leave index.extends out"
            )


def draw_sample(rows: RowRange) -> Sample:
    """Up to 256 vectors from 16 places of the table; read here, as they are few."""
    ids: list[str] = []
    parts: list[Vectors] = []
    for share in rows.split(16) if len(rows) else ():
        few = replace(share, end=min(share.end, share.first + NUM_QUERIES // 16))
        names, vectors_ND = read_vectors(few)
        ids += names
        if names:
            parts.append(vectors_ND)
    return Sample(ids, np.concatenate(parts)) if parts else Sample()


def read_vectors(rows: RowRange) -> tuple[list[str], Vectors]:
    """The ids and vectors_ND of the rows that have one; raises `TableError` where widths differ."""
    ids: list[str] = []
    vectors_ND = np.zeros((0, 0), np.float32)
    for group in rows.row_groups(COLUMNS):
        names, of_group_ND = unit_vectors(group)
        if not names:
            continue
        if not ids:  # one place for all: no second copy at the end
            vectors_ND = np.empty((len(rows), of_group_ND.shape[1]), np.float32)
        _check_widths({vectors_ND.shape[1], of_group_ND.shape[1]})
        vectors_ND[len(ids) : len(ids) + len(names)] = of_group_ND
        ids += names
    return ids, vectors_ND[: len(ids)]


def unit_vectors(rows: pa.Table) -> tuple[list[str], Vectors]:
    """The ids and vectors_ND of the Vector rows that have one; raises `TableError` where widths differ."""
    rows = rows.filter(pc.is_null(rows["error"]))
    widths = set(pc.list_value_length(rows["vector"]).to_pylist())
    _check_widths(widths)
    # One copy of the values, without a Python object a number.
    lists = rows["vector"].combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    width = widths.pop() if widths else 0
    vectors_ND = values.reshape(len(rows), width)
    return rows["item_id"].to_pylist(), vectors_ND.astype(np.float32, copy=False)


def _check_widths(widths: set[int]) -> None:
    if len(widths) > 1:
        raise TableError(f"vectors of widths {sorted(widths)} in one table: two models made them; embed again with one")


def _write(shard: Shard, name: str, out: Artifact) -> None:
    # FAISS writes local files alone; from there they go to any filesystem.
    with tempfile.TemporaryDirectory() as folder:
        shard.save(Path(folder) / name)
        try:
            for file in sorted(Path(folder).iterdir()):
                pafs.copy_files(
                    str(file),
                    f"{out.path}/{file.name}",
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


def _finish(stem: str, shards: list[BuiltShard], tasks: list[ShardTask], out: Artifact) -> dict[str, float]:
    """Write the list of an index's shards, take their marks away, and give its figures."""
    _check_widths({shard.width for shard in shards if shard.num_vectors})
    names = [shard.name for shard in shards]
    write_file(out.fs, f"{out.path}/{stem}{SHARDS}", shards_json(names).encode())
    for name in names:
        out.fs.delete_file(f"{out.path}/{name}{BUILT}")
    recall = recall_of(tasks[0].sample.ids, shards)
    kinds = sorted({shard.kind for shard in shards})
    log.info("index of %s: %s, %d shards, recall@%d %.3f", stem, "+".join(kinds), len(shards), RECALL_AT, recall)
    if recall < LOW_RECALL:
        log.warning(
            "index of %s: recall@%d is %.3f; raise index.search_effort (hnsw) or index.num_probes and "
            "index.rerank_factor (ivf_pq), or set index.method=flat",
            stem,
            RECALL_AT,
            recall,
        )
    return {
        stem: float(sum(shard.num_vectors for shard in shards)),
        f"{stem}_shards": float(len(shards)),
        f"{stem}_recall_at_{RECALL_AT}": recall,
    }


def recall_of(ids: Sequence[str], shards: Sequence[BuiltShard]) -> float:
    """The share of the sample's true nearest that the shards together find; 1 where every shard is flat."""
    if not ids or all(shard.kind == "flat" for shard in shards):
        return 1.0
    k = RECALL_AT + 1
    neighbours = merged([shard.neighbours for shard in shards], k)
    true_neighbours = merged([shard.true_neighbours for shard in shards], k)
    num_true = 0
    num_hits = 0
    for true_names, names in zip(_names(ids, true_neighbours), _names(ids, neighbours), strict=True):
        num_true += len(true_names)
        num_hits += len(true_names & names)
    return num_hits / num_true


def _names(ids: Sequence[str], neighbours: Sequence[list[Neighbour]]) -> Iterator[set[str]]:
    """The nearest of each vector of the sample but itself."""
    for item_id, nearest in zip(ids, neighbours, strict=True):
        names = [name for _, name in nearest if name != item_id]
        yield set(names[:RECALL_AT])
