"""Rows of the tables in which data sets are published: JSON, JSONL, CSV, Parquet, Arrow, and folders of pictures.

Enters: a URI. Leaves: dicts, one a row, in the order of the file. Pictures inside Parquet or Arrow files are not read:
an `Embedded` says where one lies, and `embedded_bytes` reads it. A picture's file is a row too, of `PICTURE_COLUMNS`.
"""

import csv
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.config import ConfigError
from medmm_ray.data.source_files import read_json, read_text, stream_json
from medmm_ray.data.tables import RowError, TableError, filesystem

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PICTURE_COLUMNS = ("path", "name", "folder")
"""Of a picture's file: its URI, its name without ending, and the name of the folder that it lies in."""
KEY = "key"
"""The column of the name under which an entry stands, in a JSON object of objects."""


@dataclass(frozen=True)
class Embedded:
    """A picture inside a table: the file, the column, and the row from 0; `name` is what the table calls it."""

    table: str
    column: str
    row: int
    name: str = ""


def read_rows(
    uri: str,
    header: Sequence[str] = (),
    records: str = "",
) -> Iterator[dict[str, Any]]:
    """The rows of a table, by the ending of its name.

    Args:
        uri: The file; a ``.gz`` behind its ending is unpacked.
        header: Names of the columns of a CSV file that has no row of them.
        records: Field that holds the list, in a JSON file with an object around it.
    """
    ending = _ending(uri)
    # A folder of pictures is a table whose rows are its files.
    if ending in PICTURE_ENDINGS:
        yield _picture_row(uri)
    elif ending in (".jsonl", ".ndjson"):
        yield from _lines(uri)
    elif ending == ".json":
        yield from _json_rows(uri, records)
    elif ending in (".csv", ".tsv"):
        yield from _csv_rows(uri, "\t" if ending == ".tsv" else ",", header)
    elif ending in (".parquet", ".arrow"):
        yield from _columnar_rows(uri)
    else:
        raise ConfigError(
            f"{uri} is no table that can be read: {_what_it_is(uri)}. Known endings: {', '.join(ENDINGS)}"
        )


ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", *PICTURE_ENDINGS)
"""Endings of the files that `read_rows` reads."""


def _ending(uri: str) -> str:
    name = uri.rpartition("/")[2].lower().removesuffix(".gz")
    stem, dot, ending = name.rpartition(".")
    return f"{dot}{ending}" if stem else ""


def _what_it_is(uri: str) -> str:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.NotFound:
        return "it does not exist"
    with fs.open_input_stream(path, compression=None) as stream:
        start = stream.read(4)
    # Whoever downloads an archive often names it where its folder is meant.
    return "it is a zip archive; unpack it, and name the folder" if start[:2] == b"PK" else "its ending is not known"


def list_tables(uri: str) -> list[str]:
    """The files of a folder that `read_rows` reads, below it at any depth, sorted; a file is a list of itself.

    Hidden files and folders hold what programs keep for themselves, such as a hub's client: they are passed over.
    """
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise ConfigError(f"{uri} does not exist; name the folder or the file of the data set as `path` of its source")
    if info.is_file:
        # A zip in place of a folder is found here, before a row is asked for.
        if _ending(uri) not in ENDINGS:
            raise ConfigError(f"{uri} is no folder and no table: {_what_it_is(uri)}")
        return [uri]
    found_files = []
    for below in fs.get_file_info(pafs.FileSelector(path, recursive=True)):
        name = below.path.removeprefix(path).lstrip("/")
        is_hidden = name.startswith(".") or "/." in name
        if below.is_file and _ending(name) in ENDINGS and not is_hidden:
            found_files.append(name)
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(found_files)]


def _picture_row(uri: str) -> dict[str, Any]:
    # A class's pictures lie in a folder of its name.
    folder, _, file = uri.rpartition("/")
    return {
        "path": uri,
        "name": file.rpartition(".")[0],
        "folder": folder.rpartition("/")[2],
    }


def _lines(uri: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(uri).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TableError(f"{uri} line {number} is not valid JSON: {error}") from None
        yield _object(row, f"{uri} line {number}")


def _json_rows(uri: str, records: str) -> Iterator[dict[str, Any]]:
    if not records and _begins_with_list(uri):
        for number, entry in enumerate(stream_json(uri)):
            yield _object(entry, f"{uri} entry {number}")
        return
    # MedMCQA calls its JSON lines .json.
    if not records and _is_lines(uri):
        yield from _lines(uri)
        return
    value = read_json(uri)
    if records:
        if not isinstance(value, dict) or not isinstance(value.get(records), list):
            raise TableError(f"{uri} has no list in a field {records!r} (`records` of its source)")
        value = value[records]
    if isinstance(value, dict):
        # PubMedQA's entries stand under their article's number.
        entries = [{KEY: key, **_object(entry, f"{uri} entry {key}")} for key, entry in value.items()]
        yield from entries
        return
    for number, entry in enumerate(value):
        yield _object(entry, f"{uri} entry {number}")


def _begins_with_list(uri: str) -> bool:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check the `path` of its source")
    with fs.open_input_stream(path) as stream:
        start: bytes = stream.read(64)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _is_lines(uri: str) -> bool:
    """Whether a .json file has an object a line, as some sets call theirs."""
    text = read_text(uri)
    first, _, rest = text.strip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except json.JSONDecodeError:
        return False


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TableError(f"{where} must be an object with named fields, not a {type(entry).__name__}")
    return entry


def _csv_rows(
    uri: str,
    delimiter: str,
    header: Sequence[str],
) -> Iterator[dict[str, Any]]:
    # Fields of clinical notes are longer than csv's own limit.
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(read_text(uri), newline=""), delimiter=delimiter)
    # MMLU's files have no row of names.
    names = list(header) or next(rows, [])
    for row in rows:
        if not row:
            continue
        # A shifted field would become another question's answer.
        if len(row) != len(names):
            raise TableError(
                f"{uri} line {rows.line_num} has {len(row)} fields and the file {len(names)} columns "
                f"({', '.join(names)}); a comma or a line break in a field needs quotes around it"
            )
        yield dict(zip(names, row, strict=True))


# Parquet and Arrow


def _columnar_rows(uri: str) -> Iterator[dict[str, Any]]:
    number = 0
    for batch in _batches(uri):
        pictures = _picture_columns(batch.schema)
        # Bytes are read when a picture is made: a table of pictures has gigabytes of them.
        plain = batch.select([name for name in batch.schema.names if name not in pictures])
        names_of = {column: _picture_names(batch, column) for column in pictures}
        for place, row in enumerate(plain.to_pylist()):
            for column in pictures:
                name = names_of[column][place]
                row[column] = (
                    None
                    if name is None
                    else Embedded(
                        uri,
                        column,
                        number + place,
                        name,
                    )
                )
            yield row
        number += batch.num_rows


def _batches(uri: str) -> Iterator[pa.RecordBatch]:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check the `path` of its source")
    try:
        if uri.endswith(".arrow"):
            with fs.open_input_stream(path) as stream:
                yield from pa.ipc.open_stream(stream)
            return
        with pq.ParquetFile(fs.open_input_file(path)) as file:
            yield from file.iter_batches(batch_size=256)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{uri} is no Parquet or Arrow file: {error}") from None


def _picture_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold pictures: bytes, or bytes beside a path, as the datasets library writes them."""
    columns = []
    for column in schema:
        # The datasets library writes {bytes, path}, others the bytes alone.
        is_pair = pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
        if is_pair or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            columns.append(column.name)
    return columns


def _picture_names(batch: pa.RecordBatch, column: str) -> list[str | None]:
    """What the table calls the pictures of a column: "" where it has no name, None where there is no picture."""
    values = batch.column(column)
    names: list[str | None] = []
    is_pair = pa.types.is_struct(values.type)
    paths = [None] * len(values)
    if is_pair and values.type.get_field_index("path") >= 0:
        paths = values.field("path").to_pylist()
    for value, path in zip(values.is_valid().to_pylist(), paths, strict=True):
        names.append((path or "") if value else None)
    return names


def pointer(picture: Embedded) -> str:
    """An embedded picture as the text that `embedded_bytes` reads."""
    return json.dumps({"embedded": asdict(picture)})


def embedded_bytes(place: Mapping[str, Any]) -> bytes:
    """The bytes of an embedded picture, by the fields of its `Embedded`; a `RowError` where there are none."""
    first_row, values = _group(place["table"], place["column"], place["row"])
    # Rows of a group are counted from its first.
    value = values[place["row"] - first_row].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if not content:
        raise RowError("image_empty", f"{place['table']} has no bytes in {place['column']} of row {place['row']}")
    return bytes(content)


# A row group is decoded once for all of its pictures, which come in the order of the file.
@functools.lru_cache(maxsize=2)
def _group_at(
    uri: str,
    column: str,
    group: int,
) -> pa.ChunkedArray:
    fs, path = filesystem(uri)
    if uri.endswith(".arrow"):
        with fs.open_input_stream(path) as stream:
            return pa.ipc.open_stream(stream).read_all().column(column)
    with pq.ParquetFile(fs.open_input_file(path)) as file:
        return file.read_row_group(group, columns=[column]).column(column)


@functools.lru_cache(maxsize=64)
def _group_starts(uri: str) -> tuple[int, ...]:
    """The first row of each row group."""
    # A stream has no groups: it is read whole.
    if uri.endswith(".arrow"):
        return (0,)
    fs, path = filesystem(uri)
    starts, number = [], 0
    with pq.ParquetFile(fs.open_input_file(path)) as file:
        for group in range(file.num_row_groups):
            starts.append(number)
            number += file.metadata.row_group(group).num_rows
    return tuple(starts)


def _group(
    uri: str,
    column: str,
    row: int,
) -> tuple[int, pa.ChunkedArray]:
    starts = _group_starts(uri)
    group = 0
    while group + 1 < len(starts) and starts[group + 1] <= row:
        group += 1
    return starts[group], _group_at(uri, column, group)
