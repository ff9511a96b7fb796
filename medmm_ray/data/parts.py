"""Part files of a table in the making: Parquet with a footer of the ids that it holds, what failed, a hash of its rows.

The footer is what resuming and committing read: neither opens the rows themselves. A part's name is the hash of its
bytes, so that it never changes: who writes it again writes the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import TableError, write_file
from medmm_ray.data.records import ROW_GROUPS, arrow_schema

PARTS = ".parts"
"""The folder, in a table's, of what is in the making."""
VOLATILE = ("cost", "seconds", "attempts", "uri")
"""Fields that a rerun elsewhere may change: not in the content hash."""
FIGURES = "medmm_figures"
"""The key of a part file's metadata with the figures of each id, as JSON."""
UPSTREAM = "upstream"
"""The kind of error that a row has from a row it was made from."""


def error_kind(error: str) -> str:
    """The kind of a row's ``kind: message``."""
    return error.partition(":")[0]


@dataclass(frozen=True)
class PartFooter:
    """What a part file says of itself: the JSON under ``medmm`` in its Parquet metadata, in this order.

    `failed` are the ids with an error of their own and `errors` counts these by kind; `inherited` counts rows with an
    upstream row's error. `rows` are its records, `figures` the sums of those of the ids (which the file has under
    ``medmm_figures``, by id), `cost` is in US dollars, `hash` is `rows_hash`.
    """

    ids: list[str]
    failed: list[str]
    errors: dict[str, int]
    inherited: int
    rows: int
    figures: dict[str, float] = field(default_factory=dict)
    cost: float = 0.0
    hash: str = ""

    @classmethod
    def of(
        cls,
        rows: pa.Table,
        ids: list[str],
        key: str,
        figures: Mapping[str, Mapping[str, float]],
    ) -> "PartFooter":
        """The footer of `rows`, made for `ids` (several rows, or none, may have the same id)."""
        failed: set[str] = set()
        errors: Counter[str] = Counter()
        num_inherited = 0
        row_ids = rows.column(key).to_pylist()
        row_errors = rows.column("error").to_pylist()
        for row_id, error in zip(row_ids, row_errors, strict=True):
            if not error:
                continue
            kind = error_kind(error)
            if kind == UPSTREAM:  # not of this step: to make the row again would change nothing
                num_inherited += 1
            else:
                failed.add(row_id)
                errors[kind] += 1
        has_cost = "cost" in rows.column_names
        return cls(
            ids=ids,
            failed=sorted(failed),
            errors=dict(errors),
            inherited=num_inherited,
            rows=rows.num_rows,
            figures=_sums(figures.values()),
            cost=(pc.sum(rows.column("cost")).as_py() or 0.0) if has_cost else 0.0,
            hash=rows_hash(rows),
        )

    @classmethod
    def read(cls, fs: pafs.FileSystem, file: str) -> "PartFooter":
        """The footer of a part file; raises ValueError, KeyError or TypeError where the file is none."""
        return cls(**json.loads(pq.read_schema(file, filesystem=fs).metadata[b"medmm"]))

    def to_json(self) -> str:
        return json.dumps(vars(self))


@dataclass(frozen=True)
class Part:
    """A part file: its name in the folder, its size and its footer."""

    name: str
    num_bytes: int
    footer: PartFooter

    def to_json(self) -> str:
        """The part as one line, as an index has it."""
        return json.dumps({"name": self.name, "num_bytes": self.num_bytes, "footer": vars(self.footer)})

    @classmethod
    def parse(cls, line: str) -> "Part":
        """The part that a line of an index describes."""
        row = json.loads(line)
        return cls(
            row["name"],
            row["num_bytes"],
            PartFooter(**row["footer"]),
        )


@dataclass(frozen=True)
class PartWriter:
    """Writes part files of one record type to `folder`, in whichever process makes the rows."""

    fs: pafs.FileSystem
    folder: str
    record: type

    def write(
        self,
        rows: pa.Table,
        key: str,
        explode: str | None = None,
    ) -> Part | None:
        """Write one part file: whole or not at all; None, and nothing is written, where there are no rows.

        `rows` holds one row an id of `key`; with `explode`, the records are that list column's entries. A struct column
        `figures` of numbers is no part of a record: the manifest has its sums.
        """
        ids = rows.column(key).to_pylist()
        if not ids:
            return None
        figures = {}
        if "figures" in rows.column_names:
            figures = dict(
                zip(
                    ids,
                    rows.column("figures").to_pylist(),
                    strict=True,
                )
            )
        return self.put(
            self._records(rows, explode),
            ids,
            key,
            figures,
        )

    def _records(self, rows: pa.Table, explode: str | None) -> pa.Table:
        """The records in `rows`, with the table's schema; a `TableError` where they do not fit it."""
        schema = arrow_schema(self.record)
        try:
            if explode:
                # Of no entry the struct array would have no columns.
                flat = rows.column(explode).combine_chunks().flatten()
                rows = pa.Table.from_struct_array(flat) if len(flat) else schema.empty_table()
            missing = [name for name in schema.names if name not in rows.column_names]
            if missing:
                raise TableError(f"{self.folder}: rows lack the columns {missing}; they have {rows.column_names}")
            return rows.select(schema.names).cast(schema)
        except pa.ArrowException as error:
            raise TableError(f"{self.folder}: rows do not fit the record {self.record.__name__}: {error}") from error

    def put(
        self,
        records: pa.Table,
        ids: list[str],
        key: str,
        figures: Mapping[str, Mapping[str, float]],
    ) -> Part:
        """Write records, made for `ids`, as one part file."""
        footer = PartFooter.of(records, ids, key, figures)
        # Apart from the footer, which drivers hold of each part: figures of an id are asked for where it is a repeat.
        metadata = {"medmm": footer.to_json(), FIGURES: json.dumps(figures)}
        rows = records.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with RecordFile(sink, rows.schema, self.record) as file:
            file.write(rows)
        content = sink.getvalue()
        part = Part(
            f"part-{hashlib.sha256(content).hexdigest()[:32]}.parquet",
            content.size,
            footer,
        )
        write_file(self.fs, f"{self.folder}/{part.name}", content)
        return part

    def put_some(self, part: Part, ids: list[str], key: str) -> Part:
        """Write the rows of some of a part's ids as a part of their own."""
        rows = read_rows(self.fs, f"{self.folder}/{part.name}")
        by_id = json.loads(rows.schema.metadata[FIGURES.encode()])
        rows = rows.filter(
            pc.is_in(
                rows[key],
                pa.array(ids),
            )
        )
        figures = {row_id: by_id[row_id] for row_id in ids if row_id in by_id}
        return self.put(rows, ids, key, figures)


class RecordFile:
    """A Parquet file of records in the making: each table that is written is a row group, or several where the record
    has `ROW_GROUPS`."""

    def __init__(self, sink: Any, schema: pa.Schema, record: type) -> None:
        self._row_groups = ROW_GROUPS.get(record)
        options: dict[str, Any] = {}
        if self._row_groups is not None:
            # Raw values neither repeat nor shrink; to try takes time, and memory for a dictionary.
            raw = self._row_groups.raw
            encoded = [name for name in schema.names if name not in raw]
            compression = dict.fromkeys(encoded, "snappy") | dict.fromkeys(raw, "none")
            options = {"use_dictionary": encoded, "compression": compression, "write_statistics": encoded}
        self._file = pq.ParquetWriter(sink, schema, **options)

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, rows: pa.Table) -> None:
        """Append rows."""
        if self._row_groups is None:
            self._file.write_table(rows, row_group_size=max(rows.num_rows, 1))
            return
        for start, stop in _group_bounds(rows[self._row_groups.column].to_pylist(), self._row_groups.num_rows):
            self._file.write_table(rows.slice(start, stop - start))


def _group_bounds(values: Sequence[str], num_rows: int) -> Iterator[tuple[int, int]]:
    """Where row groups begin and end: at most `num_rows` neighbours of one value."""
    start = 0
    for number, value in enumerate(values):
        if value != values[start] or number - start == num_rows:
            yield start, number
            start = number
    if values:
        yield start, len(values)


def fitted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of `schema`; a nullable one that a file of an earlier version lacks is null."""
    for field_ in schema:
        if field_.nullable and field_.name not in rows.column_names:
            rows = rows.append_column(field_, pa.nulls(rows.num_rows, field_.type))
    return rows.select(schema.names).cast(schema)


def read_rows(
    fs: pafs.FileSystem,
    path: str,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A small Parquet file, read in one request."""
    with fs.open_input_stream(path, compression=None) as stream:
        content = pa.py_buffer(stream.read())
    # Not read_table, which takes a dataset's machinery to each file: three times as long where it has few rows.
    return pq.ParquetFile(pa.BufferReader(content)).read(columns, use_threads=False)


def owners(parts: Iterable[Part], handed_over: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """For each id the name of the part that it is taken from: the first in which it did not fail, else the first.

    Ids that were `handed_over` stay with the part that they were taken from.
    """
    parts = list(parts)
    owner = dict(handed_over)
    for accept_failed in (False, True):  # a retry that succeeded comes before the failure that it mends
        for part in parts:
            failed = set(part.footer.failed)
            for row_id in part.footer.ids:
                if accept_failed or row_id not in failed:
                    owner.setdefault(row_id, part.name)
    return owner


def error_counts(footers: Iterable[PartFooter]) -> Counter[str]:
    """Errors by kind, without inherited ones."""
    counts: Counter[str] = Counter()
    for footer in footers:
        counts.update(footer.errors)
    return counts


def figure_sums(footers: Iterable[PartFooter]) -> dict[str, float]:
    """The sum of each figure over all ids."""
    return _sums(footer.figures for footer in footers)


def _sums(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for figures in rows:
        sums.update(figures)
    return dict(sums)


def content_hash(footers: Sequence[PartFooter]) -> str:
    """The hash of all rows: it depends neither on their order nor on the files that they are in."""
    total = sum(int(footer.hash, 16) for footer in footers)
    return f"{total % 2**128:032x}"


def rows_hash(rows: pa.Table) -> str:
    """A 128-bit hash of the rows that depends on neither their order nor the volatile fields, nested ones included."""
    # A sum: it depends on no order, and those of a table's files add up to the table's.
    total = 0
    for row in rows.to_pylist():
        text = json.dumps(
            _stable(row),
            sort_keys=True,
            default=lambda b: hashlib.sha256(b).hexdigest(),
        )
        total += int(hashlib.sha256(text.encode()).hexdigest()[:32], 16)
    return f"{total % 2**128:032x}"


def _stable(value: Any) -> Any:
    """A row without its volatile fields."""
    if isinstance(value, dict):
        return {name: _stable(inner) for name, inner in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return list(map(_stable, value))
    return value
