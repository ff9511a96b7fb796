"""Vectors, and what they are of, become one folder that can be searched.

Enters: the tables images, image_vectors and passages. Leaves: a collection of the training split's images and one of
each corpus's passages (`engines.index.collection`), listed in ``collections.json``: for each shard its vectors (FAISS),
ids and rows, of passages BM25 too. Rows with an error are left out: what has no vector cannot be found.

A task reads only its shard's rows, builds and writes it; the driver holds none. A shard that is written is not built
again by a run that goes on with an interrupted one. With `IndexConfig.extends` the vectors of an earlier index's shards
are copied and only those that it lacks are built, into shards of their own.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.row_ranges import RowRange
from medmm_ray.data.tables import Artifact, TableError, write_file
from medmm_ray.engines.index import SHARDS, Index, IndexConfig, Neighbour, Vectors, merged, shard_name, shards_json
from medmm_ray.engines.index.collection import COLLECTIONS, collection_names
from medmm_ray.engines.index.encoders import ENCODERS, IndexEncoders
from medmm_ray.engines.index.lexical import CorpusStatistics
from medmm_ray.engines.index.shard import kind_of, vector_bytes
from medmm_ray.estimate import Line, Sizes
from medmm_ray.steps.index.shards import (
    BUILT,
    RECALL_AT,
    BuiltShard,
    CountTask,
    Run,
    Sample,
    ShardTask,
    earlier_folder,
    in_turn,
    over_ray,
)
from medmm_ray.steps.index.sources import (
    Source,
    check_widths,
    read_vectors,
    recorded_encoder,
    sources,
    vector_source,
)

__all__ = [
    "VERSION",
    "BuiltShard",
    "Sample",
    "ShardTask",
    "Source",
    "build_index",
    "in_turn",
    "index_cost",
    "over_ray",
    "plan_shards",
    "recall_of",
    "recorded_encoder",
    "sources",
    "vector_source",
]

log = logging.getLogger("medmm_ray")
VERSION = 3  # of what a step makes: raise it when the same config makes something else
NUM_QUERIES = 256  # vectors whose neighbours are compared with the true ones
LOW_RECALL = 0.95
WIDTH, ID_BYTES = 512, 20  # of an image's vector and id, for the estimate


def index_cost(config: IndexConfig, sizes: Sizes) -> Line:
    """The line of the images' index, built on CPUs; that of documents is small beside it."""
    kind = kind_of(config, min(sizes.images, config.shard_size), sizes.images)
    num_shards = -(-sizes.images // config.shard_size)
    return Line(
        step="index",
        work=f"{sizes.images:,} vectors, {kind}, {num_shards} shard{'s' if num_shards > 1 else ''}",
        stored=sizes.images
        * (
            vector_bytes(
                kind,
                WIDTH,
                config.graph_links,
            )
            + ID_BYTES
        ),
    )


def build_index(
    all_sources: Sequence[Source],
    config: IndexConfig,
    out: Artifact,
    run: Run = in_turn,
    encoders: IndexEncoders | None = None,
) -> dict[str, float]:
    """Build a collection of each source in `out`'s folder (any filesystem that the tasks reach); `encoders` made them.

    Gives figures by the source's label: its vectors, shards and recall@10, the share of the 10 true nearest of a sample
    that the index finds.
    """
    out.prepare()
    encoders = encoders or IndexEncoders()
    if config.extends is not None:
        _check_extended(encoders, config)
    plans = [plan_shards(source, config, out, run) for source in all_sources]
    tasks: list[ShardTask] = [task for plan in plans for task in plan]
    built = iter(run(tasks))
    figures: dict[str, float] = {}
    for source, plan in zip(all_sources, plans, strict=True):
        shards = [next(built) for _ in plan]
        figures |= _finish(source, shards, plan[0].sample, out)
    write_file(out.fs, f"{out.path}/{ENCODERS}", encoders.to_json().encode())
    # Written last: a folder without it is no index yet.
    names = [asdict(source.name) for source in all_sources]
    write_file(out.fs, f"{out.path}/{COLLECTIONS}", json.dumps(names).encode())
    return figures


def _check_extended(encoders: IndexEncoders, config: IndexConfig) -> None:
    """Raise `ConfigError` where the vectors of the index that is extended were made by others than this run's."""
    earlier = IndexEncoders.load(earlier_folder(config))
    advice = "Only an index of the same encoders can be extended: leave index.extends out"
    earlier.check("images", encoders.images, str(config.extends), advice)
    earlier.check("passages", encoders.passages, str(config.extends), advice)


def plan_shards(
    source: Source,
    config: IndexConfig,
    out: Artifact,
    run: Run = in_turn,
) -> list[ShardTask]:
    """The tasks that make a collection: copies of the extended index's shards, then new ones."""
    rows = source.rows
    num_in_all = len(rows)
    earlier: list[str] = []
    if config.extends is not None:
        earlier, rows = _extended(source, config)
    template = ShardTask(source, source.name.stem, out, config, num_in_all, rows)
    tasks = [replace(template, earlier=name, rows=source.rows) for name in earlier]
    num_new = -(-len(rows) // config.shard_size)
    if num_new or not tasks:
        tasks += [replace(template, rows=share) for share in rows.split(max(num_new, 1))]
    is_exact = (
        kind_of(
            config,
            min(num_in_all, config.shard_size),
            num_in_all,
        )
        == "flat"
        and not earlier
    )
    sample = Sample() if is_exact else draw_sample(source)
    statistics = (
        _statistics(
            source,
            config,
            run,
        )
        if source.name.is_lexical and len(tasks) > 1
        else None
    )
    plan: list[ShardTask] = []
    for i, task in enumerate(tasks):
        name = shard_name(source.name.stem, i)
        plan.append(replace(task, name=name, sample=sample, statistics=statistics))
    return plan


def _statistics(
    source: Source,
    config: IndexConfig,
    run: Run,
) -> CorpusStatistics:
    """What BM25 needs to know of a corpus that has several shards."""
    # Not by the shards of the plan, which may be copies of an earlier index: by rows, which are all of the corpus.
    shares = source.rows.split(-(-len(source.rows) // config.shard_size))
    return CorpusStatistics.sum(run([CountTask(config, share) for share in shares]))


def _extended(source: Source, config: IndexConfig) -> tuple[list[str], RowRange]:
    """The shards of an earlier index's collection, and the rows with a vector that it lacks; of them only ids are
    read."""
    folder = earlier_folder(config)
    names = [
        name for name in collection_names(folder) if (name.of, name.corpus) == (source.name.of, source.name.corpus)
    ]
    if not names:  # a corpus that the earlier index did not have
        return [], source.rows
    index = Index.load(folder / names[0].stem)
    old_ids = pa.array(index.ids, pa.string())
    is_new: list[Vectors] = [np.zeros(0, np.bool_)]
    num_old = 0
    for group in source.rows.row_groups([source.key, "error"]):
        is_old = pc.is_in(group[source.key], old_ids)
        is_sound = pc.is_null(group["error"])
        num_old += pc.sum(pc.and_(is_old, is_sound)).as_py() or 0
        is_new.append(pc.and_not(is_sound, is_old).to_numpy(zero_copy_only=False).astype(np.bool_))
    if num_old != len(old_ids):
        raise TableError(
            f"index.extends: {config.extends} holds {len(old_ids)} {source.label}, of which {len(old_ids) - num_old} "
            "have no vector in this run; only an index of some of the run's vectors can be extended: leave "
            "index.extends out"
        )
    shard_names = [shard_name(names[0].stem, i) for i in range(len(index.shards))]
    return shard_names, source.rows.among(np.concatenate(is_new))


def draw_sample(source: Source) -> Sample:
    """Up to 256 vectors from 16 places of the table; read here, as they are few."""
    ids: list[str] = []
    parts: list[Vectors] = []
    for share in source.rows.split(16) if len(source.rows) else ():
        few = replace(share, end=min(share.end, share.first + NUM_QUERIES // 16))
        names, vectors_ND = read_vectors(few, source.key)
        ids += names
        if names:
            parts.append(vectors_ND)
    return Sample(ids, np.concatenate(parts)) if parts else Sample()


def _finish(
    source: Source,
    shards: list[BuiltShard],
    sample: Sample,
    out: Artifact,
) -> dict[str, float]:
    """Write the list of a collection's shards, take their marks away, and give its figures."""
    check_widths({shard.width for shard in shards if shard.num_vectors})
    names = [shard.name for shard in shards]
    write_file(
        out.fs,
        f"{out.path}/{source.name.stem}{SHARDS}",
        shards_json(names).encode(),
    )
    for name in names:
        out.fs.delete_file(f"{out.path}/{name}{BUILT}")
    recall = recall_of(sample.ids, shards)
    kinds = sorted({shard.kind for shard in shards})
    label = source.label
    log.info(
        "index of %s: %s, %d shards, recall@%d %.3f",
        label,
        "+".join(kinds),
        len(shards),
        RECALL_AT,
        recall,
    )
    if recall < LOW_RECALL:
        log.warning(
            "index of %s: recall@%d is %.3f; raise index.search_effort (hnsw) or index.num_probes and "
            "index.rerank_factor (ivf_pq), or set index.method=flat",
            label,
            RECALL_AT,
            recall,
        )
    return {
        label: float(sum(shard.num_vectors for shard in shards)),
        f"{label}_shards": float(len(shards)),
        f"{label}_recall_at_{RECALL_AT}": recall,
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
    for true_names, names in zip(
        _names(ids, true_neighbours),
        _names(ids, neighbours),
        strict=True,
    ):
        num_true += len(true_names)
        num_hits += len(true_names & names)
    return num_hits / num_true


def _names(ids: Sequence[str], neighbours: Sequence[list[Neighbour]]) -> Iterator[set[str]]:
    """The nearest of each vector of the sample but itself."""
    for item_id, nearest in zip(ids, neighbours, strict=True):
        names = [name for _, name in nearest if name != item_id]
        yield set(names[:RECALL_AT])
