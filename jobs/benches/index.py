"""The index of many vectors: speed and recall against exact search, and what building it takes.

Vectors lie around centres, as those of pictures of some kinds do: both are drawn in a space of few dimensions, turned
into the width by a random projection, and get a little noise in every direction. Queries are drawn alike and are not
in the index. Searches run on one thread, and their CPU time counts, so that other work beside them does not.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.process_memory import anonymous_bytes
from jobs.benches.timing import peak_bytes
from jobs.resources import ResourceSampler
from medmm_ray.config import Config
from medmm_ray.data.compaction import ROW_GROUP_BYTES
from medmm_ray.data.records import Vector, arrow_schema
from medmm_ray.data.tables import Artifact, Provenance, Table
from medmm_ray.engines.index import Index, IndexConfig, Vectors
from medmm_ray.steps.index import build_index, in_turn, over_ray, vector_source

GIB = 2**30
K = 10


class BenchConfig(Config):
    """What is indexed, and how."""

    vectors: int = Field(1_000_000, ge=1)
    """Vectors in the index."""
    width: int = Field(512, ge=1)
    """Length of a vector."""
    centres: int = Field(1000, ge=1)
    """Centres that they lie around."""
    dimensions: int = Field(32, ge=1)
    """Dimensions of the space in which centres and vectors are drawn."""
    spread: float = 0.5
    """Standard deviation around a centre, in that of the centres."""
    noise: float = 0.05
    """Standard deviation of what is added in every direction, in the same unit."""
    queries: int = Field(256, ge=1)
    """Queries of a search, all at once."""
    repeats: int = Field(3, ge=1)
    """Searches of each side, in turn; the fastest counts."""
    chunk: int = Field(50_000, ge=1)
    """Vectors that are drawn, and written as a file, at a time."""
    index: IndexConfig = IndexConfig()
    """The index."""
    over_ray: bool = True
    """Whether the shards are built over Ray, as the step does; else one after the other in this process."""
    folder: str | None = None
    """Where table and index are written, and kept; a temporary folder without it."""
    seed: int = 0
    """Start of all random numbers."""

    @property
    def name(self) -> str:
        """What rows call the index."""
        return f"{self.vectors:,} x {self.width}"

    @property
    def gib(self) -> float:
        """Size of the vectors."""
        return 4 * self.vectors * self.width / GIB


@dataclass(frozen=True)
class Mixture:
    """What vectors are drawn from."""

    config: BenchConfig

    def draw(self, number: int, part: int) -> Vectors:
        """So many vectors of unit length; `part` names the draw."""
        config = self.config
        fixed = np.random.default_rng([config.seed, 0])
        centres = fixed.normal(size=(config.centres, config.dimensions)).astype(np.float32)
        projection, _ = np.linalg.qr(fixed.normal(size=(config.width, config.dimensions)))
        rng = np.random.default_rng([config.seed, 1 + part])
        points = rng.standard_normal((number, config.dimensions), dtype=np.float32) * np.float32(config.spread)
        points += centres[rng.integers(0, config.centres, number)]
        vectors_ND = rng.standard_normal((number, config.width), dtype=np.float32) * np.float32(config.noise)
        vectors_ND += points @ projection.T.astype(np.float32)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return vectors_ND


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Build, then search both ways."""
    mixture = Mixture(config)
    with ExitStack() as stack:
        folder = Path(config.folder or stack.enter_context(TemporaryDirectory()))
        table = write_table(mixture, str(folder / "vectors"))
        console.print(f"[dim]{config.vectors:,} vectors are written[/dim]")
        rows, figures = _build(config, table, Artifact(str(folder / "index")))
        console.print(f"[dim]{figures}[/dim]")
        recall = figures["images_recall_at_10"]
        yield Measured(f"{config.name}: recall@10 in the manifest", 1, recall, recall, "≥ 0.95", "share")
        yield from rows
        yield from _search(Index.load(folder / "index" / "images"), mixture)


def _build(config: BenchConfig, table: Table, out: Artifact) -> tuple[list[Measured], dict[str, float]]:
    """The rows of building, and the figures of the manifest."""
    from medmm_ray.session import session

    figures: dict[str, float] = {}
    with ExitStack() as stack:
        if config.over_ray:
            stack.enter_context(session())
        run = over_ray if config.over_ray else in_turn
        sampler = stack.enter_context(ResourceSampler(interval_s=2.0))
        started = time.perf_counter()
        source = vector_source("images", table)
        own = peak_bytes(lambda: figures.update(build_index([source], config.index, out, run)), "cpu") / GIB
        minutes = (time.perf_counter() - started) / 60
        sampler.sample()
    gib, peak, name = config.gib, sampler.peak_gib, config.name
    rows = [
        Measured(f"{name}: minutes of building, of one core", minutes, sampler.core_minutes, 0, "", "wall, CPU"),
        Measured(f"{name}: memory of building, all processes", gib, peak, peak / gib, "", "GiB"),
        Measured(f"{name}: memory of the driver", gib, own, own / gib, "≤ 0.1" if config.over_ray else "", "GiB"),
    ]
    return rows, figures


def write_table(mixture: Mixture, uri: str) -> Table:
    """The table of the index's vectors, drawn and written in parts."""
    config = mixture.config
    table = Table(uri, Vector, target_bytes=1)
    if table.is_complete:
        return table
    table.prepare()
    files: list[str] = []
    for part, first in enumerate(range(0, config.vectors, config.chunk)):
        vectors_ND = mixture.draw(min(config.chunk, config.vectors - first), part)
        names = [f"im{i:09}" for i in range(first, first + len(vectors_ND))]
        files.append(f"part-{part:06}.parquet")
        # Not through `Table.write_part`: to hash and to compress random numbers would take longer than all else.
        pq.write_table(
            _rows(names, vectors_ND),
            f"{table.path}/{files[-1]}",
            row_group_size=ROW_GROUP_BYTES // (4 * config.width),  # as compacted tables have them
            compression="none",
            use_dictionary=False,
        )
    origin = Provenance(name="vectors", fingerprint="bench", config=config.model_dump(), upstream={})
    table.commit(origin, 0.0, rows=config.vectors, files=files)
    return table


def _rows(names: list[str], vectors_ND: Vectors) -> pa.Table:
    schema = arrow_schema(Vector)
    borders = np.arange(len(names) + 1, dtype=np.int32) * vectors_ND.shape[1]
    lists = pa.ListArray.from_arrays(borders, pa.array(vectors_ND.reshape(-1)))
    nothing = pa.nulls(len(names), pa.string())
    columns = {"item_id": pa.array(names), "vector": lists, "encoder": nothing, "error": nothing}
    return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _search(index: Index, mixture: Mixture) -> Iterator[Measured]:
    """The rows of searching: CPU time on one thread, recall, and memory that is not the files' own."""
    import faiss

    faiss.omp_set_num_threads(1)
    config = mixture.config
    queries_QD = mixture.draw(config.queries, part=10**6)
    exact = Index([shard.exact() for shard in index.shards])
    before = anonymous_bytes()
    index.search(queries_QD, K)  # what is mapped is read from the disk once
    anonymous_gib = max(anonymous_bytes() - before, 0) / GIB
    exact.search(queries_QD[:4], K)
    seconds = {"exact": float("inf"), "index": float("inf")}
    ids: dict[str, list[list[str]]] = {}
    for _ in range(config.repeats):
        for side, searched in (("exact", exact), ("index", index)):
            started = time.process_time()
            ids[side], _ = searched.search(queries_QD, K)
            seconds[side] = min(seconds[side], time.process_time() - started)
    kinds = "+".join(sorted({shard.kind for shard in index.shards}))
    name = f"{config.name}, {kinds}"
    baseline_ms, ms = (1000 * seconds[side] / config.queries for side in ("exact", "index"))
    yield Measured(f"{name}: gain over flat", baseline_ms, ms, baseline_ms / ms, "≥ 10", "CPU ms a query")
    recall = _recall(ids["exact"], ids["index"])
    yield Measured(f"{name}: recall@10 of new queries", 1, recall, recall, "≥ 0.95", "share")
    ratio = anonymous_gib / config.gib
    yield Measured(f"{name}: memory of a search beside the files", config.gib, anonymous_gib, ratio, "", "GiB")


def _recall(true_ids: list[list[str]], ids: list[list[str]]) -> float:
    num_hits = sum(len(set(true) & set(row)) for true, row in zip(true_ids, ids, strict=True))
    return num_hits / sum(map(len, true_ids))
