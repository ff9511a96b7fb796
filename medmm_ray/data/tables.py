"""What a table is: Parquet part files of one record type in a folder of their own; complete when its manifest exists.

A table is write-once. Rows are written in part files as they are made, each with the ids that it holds in its footer,
so that an interrupted job resumes exactly: ids that were written without an error are not made again, failed ones are
tried once more. `finish` checks that every id that entered left once, drops what a retried task wrote twice, and has
``manifest.json`` written last: on an object store too, the manifest *is* the commit and readers take the list of files
from it. A folder that is not a table (an index, a
checkpoint) is an `Artifact`, complete by the same rule.

No library does this: Ray Data and Hugging Face's datasets write files that know no ids, so that an interrupted write
starts again, and Delta Lake or Iceberg commit files without knowing which ids are still to be made.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medmm_ray.config import digest
from medmm_ray.data.artifacts import (
    Artifact,
    Manifest,
    Provenance,
    TableError,
    code_revision,
    filesystem,
    follow,
    package_versions,
    read_json,
    write_file,
)
from medmm_ray.data.parts import (
    PartFooter,
    content_hash,
    error_counts,
    error_kind,
    figure_sums,
    owners,
    part_bytes,
    rows_hash,
)
from medmm_ray.data.records import arrow_schema, to_arrow

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
    from ray.data._internal.execution.interfaces import TaskContext

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
        """Paths of the part files of a complete table."""
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

    def stream(self) -> Iterator[pa.Table]:
        """The part files one at a time, for what is too large to be held whole; of a table in the making, those so far.

        Before its end a table may hold a row twice.
        """
        for file in self.files() if self.is_complete else self.parts():
            yield fitted(pq.read_table(file, filesystem=self.fs), self.schema)

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
        return ds.repartition(target_num_rows_per_block=rows_per_block) if rows_per_block else ds

    # Writing

    def parts(self) -> list[str]:
        """Paths of the part files that are there now, sorted."""
        return [f for f in self._files() if f.endswith(".parquet")]

    def done_ids(self) -> set[str]:
        """Ids that left without an error so far; the others are (re)made by the next run."""
        done: set[str] = set()
        for file in self.parts():
            footer = self._footer(file)
            # A failed id is not done: the next run tries it again.
            done |= set(footer.ids) - set(footer.failed)
        return done

    def rows_so_far(self) -> int:
        """Ids in the part files, read from their names: cheap enough to poll."""
        num_ids = 0
        for file in self.parts():
            num_ids += int(Path(file).stem.rsplit("-", 1)[1])
        return num_ids

    def write_part(self, rows: pa.Table, key: str, explode: str | None = None) -> None:
        """Append one part file: whole or not at all, named by the ids that it holds.

        `rows` holds one row an id of `key`; with `explode`, the records are that list column's entries. A struct column
        `figures` of numbers is no part of a record: the manifest has its sums.
        """
        ids = rows.column(key).to_pylist()
        if not ids:
            return
        figures = {}
        if "figures" in rows.column_names:
            figures = dict(
                zip(
                    ids,
                    rows.column("figures").to_pylist(),
                    strict=True,
                )
            )
        self._put(
            self._records(rows, explode),
            ids,
            key,
            figures,
        )

    def _records(self, rows: pa.Table, explode: str | None) -> pa.Table:
        """The records in `rows`, with the table's schema; a `TableError` where they do not fit it."""
        try:
            if explode:
                # Of no entry the struct array would have no columns.
                flat = rows.column(explode).combine_chunks().flatten()
                rows = pa.Table.from_struct_array(flat) if len(flat) else self.schema.empty_table()
            missing = [name for name in self.schema.names if name not in rows.column_names]
            if missing:
                raise TableError(f"{self.uri}: rows lack the columns {missing}; they have {rows.column_names}")
            return rows.select(self.schema.names).cast(self.schema)
        except pa.ArrowException as error:
            raise TableError(f"{self.uri}: rows do not fit the record {self.record.__name__}: {error}") from error

    def _put(self, rows: pa.Table, ids: list[str], key: str, figures: Mapping[str, Any]) -> str:
        """Write one part file and give its path."""
        footer = PartFooter.of(rows, ids, key, figures)
        # Its name is that of its ids: a retried task writes the same file again instead of a second one.
        name = f"part-{digest(sorted(ids), bool(footer.failed))}-{len(ids)}.parquet"
        path = f"{self.path}/{name}"
        write_file(self.fs, path, part_bytes(rows, footer))
        return path

    def _footer(self, file: str) -> PartFooter:
        try:
            return PartFooter.read(self.fs, file)
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            raise TableError(
                f"{file} is not a part file of a table ({error}); delete it and run the step again"
            ) from error

    def write(self, ds: "Dataset", key: str, explode: str | None = None) -> None:
        """Write a dataset's rows as part files while they are made."""
        ds.write_datasink(_sink(self, key, explode))

    def finish(
        self,
        provenance: Provenance,
        key: str,
        expected: Iterable[str],
        seconds: float,
        max_error_rate: float = 1.0,
        figures: dict[str, float] | None = None,
    ) -> Manifest:
        """Check that each expected id left exactly once, then commit.

        Raises `TableError` where ids are missing, or where more than `max_error_rate` of the rows have an error of
        their own (inherited ones do not count); what is written stays, and a next run makes only the rest again.
        """
        if self.is_complete:  # by another driver: its files are not touched
            return self.manifest()
        # What was written twice goes first, so that each id is counted once.
        footer_by_file = self._drop_repeats(key)
        footers = list(footer_by_file.values())
        self._check_ids(footers, set(expected))
        num_rows = 0
        for file in footer_by_file:  # from the footers: no data is read
            num_rows += pq.read_metadata(file, filesystem=self.fs).num_rows
        errors = error_counts(footers)
        if errors and errors.total() > max_error_rate * max(num_rows, 1):
            raise TableError(self._too_many_errors(footer_by_file, num_rows, errors, max_error_rate))
        columns = [f"{field_.name}:{field_.type}:{field_.nullable}" for field_ in self.schema]
        return self.commit(
            provenance,
            seconds,
            figure_sums(footers) | (figures or {}),
            rows=num_rows,
            files=[Path(file).name for file in footer_by_file],
            schema_hash=digest(columns),
            content_hash=content_hash(footers),
            errors=dict(errors),
            cost=sum(footer.cost for footer in footers),
        )

    def _check_ids(self, footers: Iterable[PartFooter], expected: set[str]) -> None:
        """Raise `TableError` where the part files do not hold exactly the expected ids."""
        written: set[str] = set()
        for footer in footers:
            written.update(footer.ids)
        missing = expected - written
        unknown = written - expected
        if missing or unknown:
            raise TableError(
                f"{self.uri}: {len(missing)} of {len(expected)} ids are missing and {len(unknown)} are unknown, "
                f"e.g. {sorted(missing | unknown)[:3]}. Run the step again: it makes only what is missing."
            )

    def _too_many_errors(
        self,
        footer_by_file: Mapping[str, PartFooter],
        num_rows: int,
        errors: Counter[str],
        max_error_rate: float,
    ) -> str:
        """What failed, with an example, and what to do."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in errors.most_common())
        return (
            f"{self.uri}: {errors.total()} of {num_rows} rows failed ({kinds}), more than max_error_rate="
            f"{max_error_rate:g}{self._example(footer_by_file, errors)}. All rows are kept in the part files there "
            "(column 'error'); mend the cause and run again to retry only those, or raise max_error_rate to accept "
            f"them.{_kept_replies(errors)}"
        )

    def _example(self, footer_by_file: Mapping[str, PartFooter], errors: Counter[str]) -> str:
        """The words of an error of the most frequent kind that quotes no model: what it says may be clinical text."""
        for kind, _ in errors.most_common():
            if kind.endswith(QUOTING):
                continue
            for file, footer in footer_by_file.items():
                if kind in footer.errors:
                    return f"; one says {self._error_of(file, kind)[:EXAMPLE_CHARACTERS]!r}"
        return ""

    def _error_of(self, file: str, kind: str) -> str:
        """The first error of a kind in a part file that has one; only that column is read."""
        errors = pq.read_table(file, filesystem=self.fs, columns=["error"])["error"]
        example: str = next(error for error in errors.to_pylist() if error and error_kind(error) == kind)
        return example

    def _drop_repeats(self, key: str) -> dict[str, PartFooter]:
        """Keep each id once (one without an error first): a retried task may have written a part again.

        Gives the files that hold the table, with their footers; one that comes later, from a worker that outlived its
        driver, is none of them. A file is deleted only after all that takes its place is written.
        """
        footer_by_file = {file: self._footer(file) for file in self.parts()}
        owner = owners(footer_by_file)
        # A file all of whose ids are its own stays; of another one the rest is written anew, if there is a rest.
        final: dict[str, PartFooter] = {}
        replaced: set[str] = set()
        for file, footer in footer_by_file.items():
            ids = [row_id for row_id in footer.ids if owner[row_id] == file]
            if len(ids) == len(footer.ids):
                final[file] = footer
                continue
            replaced.add(file)
            if ids:
                shorter = self._put_some(file, footer, ids, key)
                final[shorter] = self._footer(shorter)
        for file in replaced - set(final):
            self.fs.delete_file(file)
        return dict(sorted(final.items()))

    def _put_some(self, file: str, footer: PartFooter, ids: list[str], key: str) -> str:
        """Write the rows of some of a part file's ids as a part file of their own, and give its path."""
        rows = pq.read_table(file, filesystem=self.fs)
        rows = rows.filter(
            pc.is_in(
                rows[key],
                pa.array(ids),
            )
        )
        figures = {row_id: footer.figures[row_id] for row_id in ids if row_id in footer.figures}
        return self._put(rows, ids, key, figures)


def _kept_replies(errors: Iterable[str]) -> str:
    # Such replies are paid for: without a hint a reader would ask why they are not asked for again.
    kinds = ", ".join(sorted(kind for kind in errors if kind.endswith("_reply")))
    if not kinds:
        return ""
    return f" Replies that do not fit ({kinds}) are kept: to ask anew, run again with one more of the step's `tries`."


def _sink(table: Table, key: str, explode: str | None) -> Any:
    from ray.data import Datasink

    # Written in the tasks that made the rows: nothing passes through the driver, and what is written stays.
    class PartSink(Datasink):  # type: ignore[type-arg]
        def write(self, blocks: Iterable[Any], ctx: "TaskContext") -> None:  # noqa: ARG002
            for block in map(_arrow, blocks):
                if block.num_rows:  # an empty block has no columns
                    table.write_part(block, key, explode)

    return PartSink()


def _arrow(block: Any) -> pa.Table:
    return block if isinstance(block, pa.Table) else pa.Table.from_pandas(block, preserve_index=False)


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


def attach(ds: "Dataset", lookup: pa.Table, on: str, columns: Sequence[str]) -> "Dataset":
    """Add `columns` of `lookup` to each row of `ds` by the id in column `on`; null where `lookup` has no such row.

    `lookup` is shared through the object store, once a node.
    """
    import ray

    # A join would shuffle all of `ds`, images included; a lookup fits into memory once a node.
    ref = ray.put(lookup.select([on, *columns]).combine_chunks())

    def look_up(batch: pa.Table) -> pa.Table:
        table = ray.get(ref)
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
    for stale in table.parts():  # of a run that ended before its manifest
        table.fs.delete_file(stale)
    if ids:
        table._put(arrow, ids, key, {})
    return table.finish(provenance, key, ids, seconds, max_error_rate, figures=figures)
