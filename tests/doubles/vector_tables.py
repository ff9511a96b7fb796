"""Tables of vectors, written as the embedding step writes them."""

import pyarrow as pa

from medmm_ray.data.records import Vector
from medmm_ray.data.tables import Provenance, Table


def vector_table(uri: str, rows: pa.Table, rows_per_file: int = 1000) -> Table:
    """A complete table of Vector rows at `uri`, in files of so many rows each."""
    table = Table(uri, Vector, target_bytes=1)
    table.prepare()
    for first in range(0, len(rows), rows_per_file):
        table.write_part(rows.slice(first, rows_per_file), "item_id")
    origin = Provenance(name="vectors", fingerprint="f", config={}, upstream={})
    table.finish(origin, "item_id", rows["item_id"].to_pylist(), seconds=1.0)
    return table
