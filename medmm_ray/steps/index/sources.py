"""What goes into an index: which rows of which tables become a collection, and what of them can be looked up there.

Enters: the tables images, image_vectors and passages. Leaves: a `Source` of the training split's images, and one of
each corpus's passages; of their rows only ids and names are read here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medmm_ray.data.row_ranges import RowRange
from medmm_ray.data.tables import Table, TableError
from medmm_ray.engines.encoder_identity import EncoderIdentity
from medmm_ray.engines.index import Vectors
from medmm_ray.engines.index.collection import CollectionName

TRAIN = "train"  # the only split that reference images come from
IMAGE_COLUMNS = ("uri", "sha256", "diagnosis", "modality")
PASSAGE_COLUMNS = ("document_id", "corpus", "title", "text", "date", "modality")


@dataclass(frozen=True)
class Source:
    """The rows of one collection: those that count of `rows`, by their `key`.

    `columns` of `details`, a table's rows by `details_key`, are kept beside them; without it, of `rows` themselves.
    """

    name: CollectionName
    rows: RowRange
    key: str = "item_id"
    columns: tuple[str, ...] = ()
    details: RowRange | None = None
    details_key: str = ""

    @property
    def label(self) -> str:
        """What figures and messages call it."""
        return f"{self.name.of}_{self.name.corpus}" if self.name.corpus else self.name.of

    def details_of(
        self,
        ids: pa.Array,
        rows: RowRange,
    ) -> pa.Table:
        """The columns of the rows with some ids, in the order of the ids; read from `rows`, or from the details."""
        key = self.details_key or self.key
        # All of them are texts, which an empty table must know too.
        names = [key, *self.columns]
        parts = [pa.schema([pa.field(name, pa.string()) for name in names]).empty_table()]
        for group in (self.details or rows).row_groups(names):
            parts.append(group.filter(pc.is_in(group[key], ids)).cast(parts[0].schema))
        table = pa.concat_tables(parts).combine_chunks()
        places = pc.index_in(ids, table[key].combine_chunks())
        if places.null_count:
            raise TableError(
                f"index: {places.null_count} of {len(ids)} {self.label} have a vector and no row; embed again"
            )
        return table.take(places).select(list(self.columns))


def sources(
    images: Table,
    image_vectors: Table,
    passages: Table,
) -> list[Source]:
    """What an index is made of."""
    return [image_source(images, image_vectors), *passage_sources(passages)]


def vector_source(stem: str, vectors: Table) -> Source:
    """All vectors of a table, with nothing to look up beside them."""
    return Source(CollectionName(stem, "images"), RowRange.whole(vectors))


def image_source(images: Table, image_vectors: Table) -> Source:
    """The images of the training split; the others may be no reference."""
    # The vectors' table knows no splits, and its rows have another order than the images'.
    details = RowRange.whole(images)
    is_train: list[pa.Table] = []
    for group in details.row_groups(["image_id", "split"]):
        is_train.append(group.filter(pc.equal(group["split"], TRAIN)))
    train_ids = pa.concat_tables(is_train)["image_id"].combine_chunks() if is_train else pa.array([], pa.string())
    rows = RowRange.whole(image_vectors)
    masks = [pc.is_in(group["item_id"], train_ids) for group in rows.row_groups(["item_id"])]
    return Source(
        CollectionName("images", "images"),
        rows.only(_joined(masks)),
        columns=IMAGE_COLUMNS,
        details=details,
        details_key="image_id",
    )


def passage_sources(passages: Table) -> list[Source]:
    """The passages of each corpus, in the order of their names; without any, one that is empty."""
    # A collection each: what is wanted of each corpus is searched in it alone, and lists of one model cover it.
    rows = RowRange.whole(passages)
    corpora = [group["corpus"] for group in rows.row_groups(["corpus"])]
    corpus_N = pa.chunked_array(corpora, pa.string()) if corpora else pa.chunked_array([[]], pa.string())
    # By their names, so that the same corpora have the same files in every run.
    names: list[str] = sorted(pc.unique(corpus_N).to_pylist()) or [""]
    all_sources: list[Source] = []
    for number, corpus in enumerate(names):
        name = CollectionName(
            f"passages.{number}",
            "passages",
            corpus,
            is_lexical=True,
        )
        mask_N = _joined([pc.equal(corpus_N, corpus)])
        all_sources.append(
            Source(
                name,
                rows.only(mask_N),
                "passage_id",
                PASSAGE_COLUMNS,
            )
        )
    return all_sources


def recorded_encoder(table: Table) -> EncoderIdentity | None:
    """What made the vectors of a table, as its rows say; None where none does. Raises `TableError` for several."""
    names: set[str] = set()
    for rows in table.stream(["encoder"]):
        names.update(pc.unique(rows["encoder"]).drop_null().to_pylist())
    identities = [EncoderIdentity.parse(name) for name in sorted(names)]
    # Names do not count: the same model from another place.
    differences = [words for identity in identities[1:] for words in identity.differences(identities[0])]
    if differences:
        raise TableError(
            f"{table.uri}: its vectors were made by {len(identities)} encoders, one of which has "
            f"{', '.join(differences)}: the model was replaced while it was made. Delete that folder and embed again"
        )
    return identities[0] if identities else None


def _joined(masks: Sequence[pa.ChunkedArray]) -> NDArray[np.bool_]:
    parts = [np.zeros(0, np.bool_)]
    for mask in masks:
        parts.append(mask.to_numpy(zero_copy_only=False).astype(np.bool_))
    return np.concatenate(parts)


def read_vectors(rows: RowRange, key: str = "item_id") -> tuple[list[str], Vectors]:
    """The ids and vectors_ND of the rows that have one; raises `TableError` where widths differ."""
    ids: list[str] = []
    vectors_ND = np.zeros((0, 0), np.float32)
    for group in rows.row_groups([key, "vector", "error"]):
        names, of_group_ND = row_vectors(group, key)
        if not names:
            continue
        if not ids:  # one place for all: no second copy at the end
            vectors_ND = np.empty((len(rows), of_group_ND.shape[1]), np.float32)
        check_widths({vectors_ND.shape[1], of_group_ND.shape[1]})
        vectors_ND[len(ids) : len(ids) + len(names)] = of_group_ND
        ids += names
    return ids, vectors_ND[: len(ids)]


def row_vectors(rows: pa.Table, key: str = "item_id") -> tuple[list[str], Vectors]:
    """The ids and vectors_ND of the rows that have one; raises `TableError` where widths differ."""
    rows = rows.filter(pc.is_null(rows["error"]))
    widths = set(pc.list_value_length(rows["vector"]).to_pylist())
    check_widths(widths)
    # One copy of the values, without a Python object a number.
    lists = rows["vector"].combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    width = widths.pop() if widths else 0
    vectors_ND = values.reshape(len(rows), width)
    return rows[key].to_pylist(), vectors_ND.astype(np.float32, copy=False)


def read_texts(rows: RowRange) -> Iterator[list[str]]:
    """Titles and texts of the passages that have a vector, a row group at a time."""
    for group in rows.row_groups(["title", "text", "error"]):
        yield titled_texts(group.filter(pc.is_null(group["error"])))


def titled_texts(rows: pa.Table) -> list[str]:
    """The text of each passage with its document's title before it, as BM25 and the cross-encoder read it."""
    pairs = zip(rows["title"].to_pylist(), rows["text"].to_pylist(), strict=True)
    return [f"{title}\n{text}" if title else text for title, text in pairs]


def check_widths(widths: set[int]) -> None:
    """Raise `TableError` where vectors of several widths are together."""
    if len(widths) > 1:
        raise TableError(f"vectors of widths {sorted(widths)} in one table: two models made them; embed again with one")
