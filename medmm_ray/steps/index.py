"""The vectors of images and of documents become two FAISS indexes in one folder.

Enters: the tables image_vectors and document_vectors. Leaves: ``images.faiss``, ``documents.faiss`` and the ids of
their rows (``*.ids.json``). Rows with an error are left out: what has no vector cannot be found.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from medmm_ray.data.tables import Artifact, TableError
from medmm_ray.engines.index import Index, IndexConfig, Vectors

VERSION = 1  # of what a step makes: raise it when the same config makes something else


def build_index(
    image_vectors: pa.Table, document_vectors: pa.Table, config: IndexConfig, out: Artifact
) -> dict[str, float]:
    """Build both indexes and write them to `out`'s folder (any filesystem); returns the number of vectors of each.

    The image index holds every split; which images may become references is for retrieval to say.
    """
    parts = {"images": image_vectors, "documents": document_vectors}
    figures = {}
    out.prepare()
    # FAISS writes local files alone; from there they go to any filesystem.
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in parts.items():
            ids, vectors_ND = unit_vectors(rows)
            index = Index.build(ids, vectors_ND, config)
            index.save(Path(folder) / name)
            figures[name] = float(len(ids))
        try:
            pafs.copy_files(
                folder,
                out.path,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=out.fs,
            )
        except OSError as error:
            raise TableError(f"cannot write the index to {out.uri}: {error}") from error
    return figures


def unit_vectors(rows: pa.Table) -> tuple[list[str], Vectors]:
    """The ids and vectors_ND of the Vector rows that have one; raises `TableError` where widths differ."""
    rows = rows.filter(pc.is_null(rows["error"]))
    lengths = pc.list_value_length(rows["vector"])
    widths = set(lengths.to_pylist())
    if len(widths) > 1:
        raise TableError(f"vectors of widths {sorted(widths)} in one table: two models made them; embed again with one")
    # One copy of the values, without a Python object a number.
    lists = rows["vector"].combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    width = widths.pop() if widths else 0
    vectors_ND = values.reshape(len(rows), width)
    return rows["item_id"].to_pylist(), vectors_ND.astype(np.float32, copy=False)
