"""Part files of a table: Parquet with a footer that says which ids it holds, what failed, and a hash of its rows.

The footer is what resuming and committing read: neither opens the rows themselves.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

VOLATILE = ("cost", "seconds", "attempts", "uri")
"""Fields that a rerun elsewhere may change: not in the content hash."""
UPSTREAM = "upstream"
"""The kind of error that a row has from a row it was made from."""


def error_kind(error: str) -> str:
    """The kind of a row's ``kind: message``."""
    return error.partition(":")[0]


@dataclass(frozen=True)
class PartFooter:
    """What a part file says of itself: the JSON under ``medmm`` in its Parquet metadata, in this order.

    `failed` are the ids with an error of their own and `errors` counts these by kind; `inherited` counts rows with an
    upstream row's error. `figures` are by id, `cost` is in US dollars, `hash` is `rows_hash`.
    """

    ids: list[str]
    failed: list[str]
    errors: dict[str, int]
    inherited: int
    figures: dict[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    hash: str = ""

    @classmethod
    def of(
        cls,
        rows: pa.Table,
        ids: list[str],
        key: str,
        figures: Mapping[str, Any],
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
            figures=dict(figures),
            cost=(pc.sum(rows.column("cost")).as_py() or 0.0) if has_cost else 0.0,
            hash=rows_hash(rows),
        )

    @classmethod
    def read(cls, fs: pafs.FileSystem, file: str) -> "PartFooter":
        """The footer of a part file; raises ValueError, KeyError or TypeError where the file is none."""
        return cls(**json.loads(pq.read_schema(file, filesystem=fs).metadata[b"medmm"]))

    def to_json(self) -> str:
        return json.dumps(vars(self))


def part_bytes(rows: pa.Table, footer: PartFooter) -> bytes:
    """The content of a part file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({"medmm": footer.to_json()}), sink)
    return bytes(sink.getvalue().to_pybytes())


def owners(footers: Mapping[str, PartFooter]) -> dict[str, str]:
    """For each id the file that it is taken from: the first in which it did not fail, else the first."""
    owner: dict[str, str] = {}
    for accept_failed in (False, True):  # a retry that succeeded comes before the failure that it mends
        for file, footer in footers.items():
            failed = set(footer.failed)
            for row_id in footer.ids:
                if accept_failed or row_id not in failed:
                    owner.setdefault(row_id, file)
    return owner


def error_counts(footers: Iterable[PartFooter]) -> Counter[str]:
    """Errors by kind, without inherited ones."""
    counts: Counter[str] = Counter()
    for footer in footers:
        counts.update(footer.errors)
    return counts


def figure_sums(footers: Iterable[PartFooter]) -> dict[str, float]:
    """The sum of each figure over all ids."""
    sums: Counter[str] = Counter()
    for footer in footers:
        for figures in footer.figures.values():
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
