"""Tables of vectors, written as the embedding step writes them."""

from typing import Any

import pyarrow as pa

from medmm_ray.data.records import Vector
from medmm_ray.data.tables import Provenance, Table


def vector_table(uri: str, rows: pa.Table, rows_per_file: int = 1000) -> Table:
    """A complete table of Vector rows at `uri`, in files of so many rows each."""
    return table_of(Vector, rows, uri, rows_per_file)


def table_of(record: Any, rows: pa.Table, uri: str, rows_per_file: int = 1000) -> Table:
    """A complete table of a record's rows at `uri`, in files of so many rows each."""
    table = Table(uri, record, target_bytes=1)
    table.prepare()
    key = record.key[0]
    for first in range(0, len(rows), rows_per_file):
        table.write_part(rows.slice(first, rows_per_file), key)
    origin = Provenance(name="rows", fingerprint="f", config={}, upstream={})
    table.finish(origin, key, rows[key].to_pylist(), seconds=1.0)
    return table
