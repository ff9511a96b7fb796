"""Corpora of documents: files and folders of any table that `medmm_ray.data.rows` reads, by a column map.

Enters: the section ``ingest.documents``. Leaves: the documents of a run's corpora, in the order of the files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmm_ray.config import Config, ConfigError
from medmm_ray.data.columns import DocumentColumns, text_at, value_at
from medmm_ray.data.rows import list_tables, read_rows
from medmm_ray.data.sources import SourceDocument
from medmm_ray.data.tables import TableError

# A timestamp is written out with its time, which counts for nothing.
_DATE = re.compile(r"(?P<day>\d{4}(-\d{2}(-\d{2})?)?)([T ].*)?$")


class DocumentsConfig(Config):
    """One corpus, or several whose rows name them."""

    path: str
    """A file or a folder of JSONL, JSON, CSV, Parquet or Arrow: MedRAG's chunks, MedQuAD, your own. Required."""
    corpus: str = ""
    """Name of the corpus; empty: the name of the file or folder, or what the rows say (`columns.corpus`)."""
    columns: DocumentColumns = DocumentColumns()
    """Which columns hold what."""
    max_documents: int | None = None
    """Documents that are taken at most, the first; null: all."""


def read_corpora(configs: Sequence[DocumentsConfig]) -> list[SourceDocument]:
    """The documents of all corpora; an empty one is a `ConfigError`."""
    documents: list[SourceDocument] = []
    for config in configs:
        corpus = list(_documents(config))[: config.max_documents]
        if not corpus:
            raise ConfigError(f"{config.path} has no document with text; check `columns.text` of its section")
        documents += corpus
    return documents


def _documents(config: DocumentsConfig) -> Iterator[SourceDocument]:
    # A corpus is called as its file, where nobody names it.
    name = config.path.rstrip("/").rpartition("/")[2].partition(".")[0]
    for uri in list_tables(config.path):
        for number, row in enumerate(read_rows(uri), 1):
            document = _document(
                config,
                name,
                row,
                f"{uri} row {number}",
            )
            # A row without text can answer nothing.
            if document.text:
                yield document


def _document(
    config: DocumentsConfig,
    name: str,
    row: Mapping[str, Any],
    where: str,
) -> SourceDocument:
    columns = config.columns
    texts = [text_at(row, column, where) for column in columns.text]
    corpus = config.corpus or name
    if columns.corpus:
        corpus = text_at(row, columns.corpus, where)
    elif not config.corpus and isinstance(row.get("corpus"), str):
        corpus = row["corpus"]
    return SourceDocument(
        corpus=corpus,
        title=_title(columns, row, where),
        text="\n".join(filter(None, texts)),
        date=_date(row, columns.date, where),
        modality=text_at(row, columns.modality, where) if columns.modality else "",
    )


def _date(
    row: Mapping[str, Any],
    column: str,
    where: str,
) -> str:
    """The date of a row, as far as it is known; "" without a column or a value."""
    date = text_at(row, column, where) if column else ""
    match = _DATE.match(date)
    if date and not match:
        raise TableError(f"{where}: {column} is {date!r}, and no date; expected 2024, 2024-05 or 2024-05-31")
    return match["day"] if match else ""


def _title(
    columns: DocumentColumns,
    row: Mapping[str, Any],
    where: str,
) -> str:
    try:
        value_at(row, columns.title, where)
    except TableError:
        # Most corpora have titles, some have none; a column that was named has to be there.
        if "title" in columns.model_fields_set:
            raise
        return ""
    return text_at(row, columns.title, where)
