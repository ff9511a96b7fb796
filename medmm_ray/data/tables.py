"""What a table is: Parquet files of one record type in a folder of their own; complete when its manifest exists.

A table is write-once. Rows are written in part files (in ``.parts``) as they are made, each with the ids that it holds
in its footer, so that an interrupted job resumes exactly: ids that were written without an error are not made again,
failed ones are tried once more. `finish` checks that every id that entered left once, drops what a retried task wrote
twice, makes few large files of the parts, and has ``manifest.json`` written last: on an object store too, the manifest
*is* the commit and readers take the list of files from it; only then the parts go. Two drivers may write a table at a
time: a file's name is the hash of what is in it, so that none is ever replaced by another, the first manifest stays,
and the other driver takes it as its own. A folder that is not a table (an index, a checkpoint) is an `Artifact`,
complete by the same rule.

No library does this: Ray Data and Hugging Face's datasets write files that know no ids, so that an interrupted write
starts again, and Delta Lake or Iceberg commit files without knowing which ids are still to be made.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.config import digest
from medmm_ray.data.artifacts import (
    Artifact,
    Manifest,
    Provenance,
    TableError,
    code_revision,
    delete_folder,
    filesystem,
    follow,
    package_versions,
    read_json,
    write_file,
)
from medmm_ray.data.compaction import TARGET_BYTES, compact, without_repeats
from medmm_ray.data.handover import parts_of_ids, read_shards
from medmm_ray.data.part_log import PartLog
from medmm_ray.data.parts import (
    PARTS,
    Part,
    PartWriter,
    content_hash,
    error_counts,
    error_kind,
    figure_sums,
    fitted,
    read_rows,
    rows_hash,
)
from medmm_ray.data.records import arrow_schema, to_arrow
from medmm_ray.data.sorted_rows import SortedRows

__all__ = [
    "Artifact",
    "Manifest",
    "Provenance",
    "RowError",
    "Table",
    "TableError",
    "attach",
    "chosen",
    "code_revision",
    "error_kind",
    "filesystem",
    "fitted",
    "follow",
    "package_versions",
    "pending",
    "read_json",
    "rows_hash",
    "write_file",
    "write_rows",
]

if TYPE_CHECKING:
    from ray.data import Dataset

LOOKUPS = ".lookups"
"""The folder, in a table's, of what its tasks look up while it is made."""
QUOTING = ("_reply", "refused")
"""Ends of the kinds of errors that quote a model."""
EXAMPLE_CHARACTERS = 240
"""Characters of an error that a message quotes."""

# What two equal runs say differently in an error.
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

    @classmethod
    def parse(cls, error: str) -> "RowError":
        """The fault that a row's `error` names."""
        kind, _, message = error.partition(": ")
        return cls(kind, message)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class TableStream:
    """Some columns of a table's rows, part by part: it may be iterated several times, each time from the beginning."""

    def __init__(self, table: "Table", columns: Sequence[str] | None) -> None:
        self._table = table
        self._columns = columns

    def __iter__(self) -> Iterator[pa.Table]:
        return self._table.row_groups(self._columns)


class Table(Artifact):
    """A folder of Parquet files of one record type; once complete, of about `target_bytes` each."""

    def __init__(
        self,
        uri: str,
        record: type,
        fs: pafs.FileSystem | None = None,
        target_bytes: int = TARGET_BYTES,
    ) -> None:
        super().__init__(uri, fs)
        self.record = record
        self.schema = arrow_schema(record)
        self.target_bytes = target_bytes
        self._log = PartLog(self.fs, self._parts_path)

    # Reading

    def files(self) -> list[str]:
        """Paths of the files of a complete table."""
        return [f"{self.path}/{name}" for name in self.manifest().files]

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, in memory, sorted by nothing."""
        missing = set(columns or ()) - set(self.schema.names)
        if missing:
            raise TableError(f"{self.uri} has no column {sorted(missing)}; it has {self.schema.names}")
        schema = self.schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        parts = []
        for file in self.files():
            rows = pq.read_table(file, filesystem=self.fs, columns=columns)
            parts.append(fitted(rows, schema))
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def stream(self, columns: Sequence[str] | None = None) -> "TableStream":
        """The rows part by part, for what is too large to be held whole; of a table in the making, those so far.

        Before its end a table may hold a row twice.
        """
        return TableStream(self, columns)

    def row_groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Some columns of what `stream` reads: a row group of a file at a time, in the order of the files."""
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        for path in self.files() if self.is_complete else self._part_files():
            with pq.ParquetFile(self.fs.open_input_file(path)) as file:
                present = [name for name in schema.names if name in file.schema_arrow.names]
                for number in range(file.num_row_groups):
                    yield fitted(file.read_row_group(number, columns=present), schema)

    def _part_files(self) -> list[str]:
        self._log.refresh()
        return [f"{self._parts_path}/{part.name}" for part in self._log.parts()]

    def dataset(
        self,
        columns: Sequence[str] | None = None,
        rows_per_block: int | None = None,
    ) -> "Dataset":
        """The table as a Ray dataset, read where it is worked on."""
        import ray

        files = self.files()
        if not files:  # Ray refuses to read no file
            return ray.data.from_arrow(self.to_arrow(columns))
        ds = ray.data.read_parquet(
            files,
            filesystem=self.fs,
            columns=list(columns) if columns else None,
        )
        # Strictly: else each block that was read leaves a short one, and an encoder's batches are half empty.
        return ds.repartition(target_num_rows_per_block=rows_per_block, strict=True) if rows_per_block else ds

    # Writing

    @property
    def _parts_path(self) -> str:
        return f"{self.path}/{PARTS}"

    @property
    def _writer(self) -> PartWriter:
        return PartWriter(self.fs, self._parts_path, self.record)

    def prepare(self) -> None:
        """Make the folder and try whether it can be written."""
        super().prepare()
        self.fs.create_dir(self._parts_path)

    def clear(self) -> None:
        """Delete what a run left that ended before its manifest."""
        self._delete_parts()
        self._log = PartLog(self.fs, self._parts_path)

    def done_ids(self) -> set[str]:
        """Ids that left without an error so far; the others are (re)made by the next run."""
        self._log.refresh()
        return self._log.done_ids()

    def parts(self) -> list[Part]:
        """The part files so far, by their names, as this object knows them since `done_ids` and by `write`."""
        return self._log.parts()

    def rows_so_far(self) -> int:
        """Ids in the part files."""
        self._log.refresh()
        return self._log.num_ids

    @property
    def rows_written(self) -> int:
        """`rows_so_far` as this object knows it since `done_ids` and by `write`: asks no disk, so may be polled."""
        return self._log.num_ids

    def write_part(self, rows: pa.Table, key: str, explode: str | None = None) -> Part | None:
        """Append one part file, as `PartWriter.write` does; gives it."""
        part = self._writer.write(rows, key, explode)
        if part is not None:
            self._log.add(part)
        return part

    def write(
        self,
        ds: "Dataset",
        key: str,
        explode: str | None = None,
        written: Callable[[Part], None] = lambda _: None,
    ) -> None:
        """Write a dataset's rows as part files while they are made; ends early where another driver was faster.

        `written` is called with each part.
        """
        # Written in the tasks that made the rows: what passes through the driver is the parts' footers.
        parts = ds.map_batches(
            _WriteParts(self._writer, key, explode),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        batches: Iterator[Any] = iter(parts.iter_batches(batch_size=None, batch_format="pyarrow"))
        try:
            for batch in batches:
                for line in batch["part"].to_pylist() if batch.num_rows else ():
                    part = Part.parse(line)
                    self._log.add(part)
                    written(part)
        except Exception:
            if not self.is_complete:  # else the parts have no folder, as another driver has finished the table
                raise
        finally:
            with suppress(TableError):  # what is not in it is opened by a next run, one by one
                self._log.write_index()

    def finish(
        self,
        provenance: Provenance,
        key: str,
        expected: Iterable[str],
        seconds: float,
        max_error_rate: float = 1.0,
        figures: dict[str, float] | None = None,
        keeps_parts: bool = False,
    ) -> Manifest:
        """Check that each expected id left exactly once, then commit.

        With `keeps_parts` they stay until `delete_leftovers`. Raises `TableError` where ids are missing, or where more
        than `max_error_rate` of the rows have an error of their own (inherited ones do not count); what is written
        stays, and a next run makes only the rest again.
        """
        adopted = self._adopt()
        if adopted is not None:
            return adopted
        try:
            self._log.refresh()
            # What was written twice goes first, so that each id is counted once.
            handed_over = parts_of_ids(read_shards(self.fs, self._parts_path))
            parts = without_repeats(self._log.parts(), self._writer, key, handed_over)
            self._check_ids(parts, set(expected))
            manifest = self._commit_parts(parts, provenance, seconds, max_error_rate, figures)
            if not keeps_parts:
                self.delete_leftovers()
            return manifest
        except (OSError, TableError):
            adopted = self._adopt()
            if adopted is None:  # else another driver has finished it and taken the parts away meanwhile
                raise
            return adopted

    def _commit_parts(
        self,
        parts: Sequence[Part],
        provenance: Provenance,
        seconds: float,
        max_error_rate: float,
        figures: dict[str, float] | None,
    ) -> Manifest:
        footers = [part.footer for part in parts]
        num_rows = sum(footer.rows for footer in footers)
        errors = error_counts(footers)
        if errors and errors.total() > max_error_rate * max(num_rows, 1):
            raise TableError(self._too_many_errors(parts, num_rows, errors, max_error_rate))
        columns = [f"{field_.name}:{field_.type}:{field_.nullable}" for field_ in self.schema]
        return self.commit(
            provenance,
            seconds,
            figure_sums(footers) | (figures or {}),
            rows=num_rows,
            files=compact(self.fs, self.path, self.record, parts, self.target_bytes),
            schema_hash=digest(columns),
            content_hash=content_hash(footers),
            errors=dict(errors),
            cost=sum(footer.cost for footer in footers),
        )

    def _adopt(self) -> Manifest | None:
        """Take the table as another driver has finished it; None where none has."""
        if not self.is_complete:
            return None
        self.delete_leftovers()
        return self.manifest()

    def delete_leftovers(self) -> None:
        """Delete what made a complete table: its parts, what tasks looked up, and files of a try that was cut off."""
        manifest = self.manifest()
        self._delete_parts()
        # Of drivers that were killed too: nobody else knows the names of their folders.
        delete_folder(self.fs, f"{self.path}/{LOOKUPS}")
        for entry in self.fs.get_file_info(pafs.FileSelector(self.path)):
            if entry.base_name.endswith(".parquet") and entry.base_name not in manifest.files:
                with suppress(FileNotFoundError):  # another driver was quicker
                    self.fs.delete_file(entry.path)

    def _delete_parts(self) -> None:
        # A worker that outlived its driver may write there at this moment: what it leaves is read by nobody.
        delete_folder(self.fs, self._parts_path)

    def _check_ids(self, parts: Iterable[Part], expected: set[str]) -> None:
        """Raise `TableError` where the part files do not hold exactly the expected ids."""
        written: set[str] = set()
        for part in parts:
            written.update(part.footer.ids)
        missing = expected - written
        unknown = written - expected
        if missing or unknown:
            raise TableError(
                f"{self.uri}: {len(missing)} of {len(expected)} ids are missing and {len(unknown)} are unknown, "
                f"e.g. {sorted(missing | unknown)[:3]}. Run the step again: it makes only what is missing."
            )

    def _too_many_errors(
        self,
        parts: Sequence[Part],
        num_rows: int,
        errors: Counter[str],
        max_error_rate: float,
    ) -> str:
        """What failed, with an example, and what to do."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in errors.most_common())
        return (
            f"{self.uri}: {errors.total()} of {num_rows} rows failed ({kinds}), more than max_error_rate="
            f"{max_error_rate:g}{self._example(parts, errors)}. All rows are kept in the part files there "
            "(column 'error'); mend the cause and run again to retry only those, or raise max_error_rate to accept "
            f"them.{_kept_replies(errors)}"
        )

    def _example(self, parts: Sequence[Part], errors: Counter[str]) -> str:
        """The words of an error of the most frequent kind that quotes no model: what it says may be clinical text."""
        for kind, _ in errors.most_common():
            if kind.endswith(QUOTING):
                continue
            for part in parts:
                if kind in part.footer.errors:
                    return f"; one says {self._error_of(part, kind)[:EXAMPLE_CHARACTERS]!r}"
        return ""

    def _error_of(self, part: Part, kind: str) -> str:
        """The first error of a kind in a part that has one; only that column is read."""
        errors = read_rows(self.fs, f"{self._parts_path}/{part.name}", ["error"])["error"]
        example: str = next(error for error in errors.to_pylist() if error and error_kind(error) == kind)
        return example


def _kept_replies(errors: Iterable[str]) -> str:
    # Such replies are paid for: without a hint a reader would ask why they are not asked for again.
    kinds = ", ".join(sorted(kind for kind in errors if kind.endswith("_reply")))
    if not kinds:
        return ""
    return f" Replies that do not fit ({kinds}) are kept: to ask anew, run again with one more of the step's `tries`."


@dataclass(frozen=True)
class _WriteParts:
    """A block of rows in, the line of its part out."""

    writer: PartWriter
    key: str
    explode: str | None

    def __call__(self, block: pa.Table) -> pa.Table:
        # An empty block has no columns.
        part = self.writer.write(block, self.key, self.explode) if block.num_rows else None
        lines = [] if part is None else [part.to_json()]
        return pa.table({"part": pa.array(lines, pa.string())})


def chosen(
    ds: "Dataset",
    key: str,
    ids: pa.Array | pa.ChunkedArray,
    keep: bool = True,
) -> "Dataset":
    """The rows of `ds` whose id is among `ids` (or, with keep=False, is not)."""
    import ray

    # Through the object store: one copy a node instead of one in every task's closure.
    ref = ray.put(ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids)

    def choose(batch: pa.Table) -> pa.Table:
        is_among = pc.is_in(batch[key], ray.get(ref))
        return batch.filter(is_among if keep else pc.invert(is_among))

    return ds.map_batches(choose, batch_format="pyarrow", zero_copy_batch=True)


def pending(ds: "Dataset", key: str, done: set[str]) -> "Dataset":
    """The rows of `ds` whose id is not in `done`."""
    return chosen(ds, key, pa.array(sorted(done), pa.string()), keep=False) if done else ds


def attach(
    ds: "Dataset",
    lookup: pa.Table | SortedRows,
    on: str,
    columns: Sequence[str],
) -> "Dataset":
    """Add `columns` of `lookup` to each row of `ds` by the id in column `on`; null where `lookup` has no such row.

    Of `SortedRows`, on storage that all machines see, a task reads the rows of its ids; a table is shared through the
    object store, whole and once a node: for the small ones.
    """
    # A join would shuffle all of `ds`, solutions included, which are most of what a run has. A task looks up the few
    # ids of its batch, and what it then does with them takes longer.
    rows_of = lookup.rows_of if isinstance(lookup, SortedRows) else _shared_rows(lookup.select([on, *columns]))

    def look_up(batch: pa.Table) -> pa.Table:
        table = rows_of(batch[on].to_pylist())
        matches = table.take(
            pc.index_in(
                batch[on],
                table[on].combine_chunks(),
            )
        )
        for column in columns:
            batch = batch.append_column(column, matches[column])
        return batch

    return ds.map_batches(look_up, batch_format="pyarrow", zero_copy_batch=True)


def _shared_rows(table: pa.Table) -> Callable[[Sequence[str]], pa.Table]:
    """What gives the whole table, for any ids, in any process of the Ray session."""
    import ray

    ref = ray.put(table.combine_chunks())

    def whole(_: Sequence[str]) -> pa.Table:
        return ray.get(ref)

    return whole


def write_rows(
    table: Table,
    rows: Sequence[Any],
    provenance: Provenance,
    key: str,
    seconds: float = 0.0,
    max_error_rate: float = 1.0,
    figures: dict[str, float] | None = None,
) -> Manifest:
    """Write a small table made in the driver, in one go."""
    arrow = to_arrow(table.record, list(rows))
    ids = list(dict.fromkeys(arrow[key].to_pylist()))
    table.prepare()
    # Parts of a run that ended before its manifest are no part of it.
    parts = [table._writer.put(arrow, ids, key, {})] if ids else []
    manifest = table._commit_parts(parts, provenance, seconds, max_error_rate, figures)
    table.delete_leftovers()
    return manifest
