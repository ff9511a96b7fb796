"""The many small parts of a table in the making become its few large files.

Parts are only read: they go when the table's manifest names the files. Each file's name is the hash of its parts'
names, themselves hashes of what is in them: whoever makes a file again, after a kill or beside another run, makes the
same one.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import is_shared, place_file, write_file
from medmm_ray.data.part_log import THREADS
from medmm_ray.data.parts import PARTS, Part, PartWriter, RecordFile, fitted, owners, read_rows
from medmm_ray.data.records import arrow_schema

TARGET_BYTES = 256 << 20
"""Size of a table's files, where it has so much."""
ROW_GROUP_BYTES = 32 << 20
"""Compressed bytes that are read and written together: what a merging process holds beside the file."""


def without_repeats(
    parts: Sequence[Part],
    writer: PartWriter,
    key: str,
    handed_over: Mapping[str, str],
) -> list[Part]:
    """Parts that hold each id once (see `owners`): a retried task may have written some again.

    What a part holds beside repeats is written as a part of its own.
    """
    owner = owners(parts, handed_over)
    rest: list[tuple[Part, list[str]]] = []
    final: dict[str, Part] = {}
    for part in parts:
        ids = [row_id for row_id in part.footer.ids if owner[row_id] == part.name]
        if len(ids) == len(part.footer.ids):
            final[part.name] = part
        elif ids:
            rest.append((part, ids))
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(lambda pair: writer.put_some(pair[0], pair[1], key), rest):
            final[part.name] = part
    return [final[name] for name in sorted(final)]


def groups(parts: Iterable[Part], target_bytes: int) -> list[list[Part]]:
    """Parts that make one file of about `target_bytes`; a part of half of that or more is one alone."""
    result: list[list[Part]] = []
    open_group: list[Part] = []
    num_bytes = 0
    for part in parts:
        if 2 * part.num_bytes >= target_bytes:
            result.append([part])
            continue
        open_group.append(part)
        num_bytes += part.num_bytes
        if num_bytes >= target_bytes:
            result.append(open_group)
            open_group, num_bytes = [], 0
    return [*result, open_group] if open_group else result


@dataclass(frozen=True)
class Merge:
    """One file of the table of `record` in `folder`, made of parts."""

    fs: pafs.FileSystem
    folder: str
    record: type
    parts: list[Part]

    def run(self) -> str:
        """Write the file; gives its name."""
        if len(self.parts) == 1:
            name = self.parts[0].name
            place_file(
                self.fs,
                f"{self.folder}/{PARTS}/{name}",
                f"{self.folder}/{name}",
            )
            return name
        names = "\n".join(part.name for part in self.parts)
        name = f"part-{hashlib.sha256(names.encode()).hexdigest()[:32]}.parquet"
        write_file(self.fs, f"{self.folder}/{name}", self._content())
        return name

    def _content(self) -> pa.Buffer:
        sink = pa.BufferOutputStream()
        file: RecordFile | None = None
        with ThreadPoolExecutor(THREADS) as pool, ExitStack() as stack:
            for chunk in groups(self.parts, ROW_GROUP_BYTES):
                rows = pa.concat_tables(pool.map(self._read, chunk))
                if file is None:
                    file = stack.enter_context(RecordFile(sink, rows.schema, self.record))
                file.write(rows)
        return sink.getvalue()

    def _read(self, part: Part) -> pa.Table:
        rows = read_rows(self.fs, f"{self.folder}/{PARTS}/{part.name}")
        # Without its footer; a run that goes on with one of an earlier version merges parts of both.
        return fitted(rows, arrow_schema(self.record))


def compact(
    fs: pafs.FileSystem,
    folder: str,
    record: type,
    parts: Sequence[Part],
    target_bytes: int,
) -> list[str]:
    """Write the files of a table of `parts`, which hold each id once; gives their names, sorted."""
    single: list[Merge] = []
    several: list[Merge] = []
    for group in groups(parts, target_bytes):
        merge = Merge(fs, folder, record, group)
        (single if len(group) == 1 else several).append(merge)
    with ThreadPoolExecutor(THREADS) as pool:
        names = list(pool.map(Merge.run, single))
    return sorted(names + _run_all(several))


def _run_all(merges: Sequence[Merge]) -> list[str]:
    """The files, made on all machines of a Ray session where there is one: rows never pass through the driver."""
    if len(merges) > 1 and "ray" in sys.modules and is_shared(merges[0].fs):
        import ray

        if ray.is_initialized():
            run_merge = ray.remote(num_cpus=1)(Merge.run)
            return list(ray.get([run_merge.remote(merge) for merge in merges]))
    return [merge.run() for merge in merges]
