"""Which parts a table in the making has: what a driver knows of them without opening each.

The tasks that write parts tell the driver, which notes many of them in one index file beside them. So a next run opens
the index files and those few parts that no index names yet, all at a time.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import TableError, write_file
from medmm_ray.data.parts import Part, PartFooter

INDEXED_PARTS = 1000
"""Parts of one index file: a run that was killed has fewer to open one by one."""
THREADS = 32
"""Files that are opened at a time: on an object store each takes tens of milliseconds of waiting."""


class PartLog:
    """The parts in a folder, by name, and the ids that they hold."""

    def __init__(self, fs: pafs.FileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder
        self._parts: dict[str, Part] = {}
        self._indexes: set[str] = set()
        self._not_indexed: list[Part] = []
        self._ids: set[str] = set()

    @property
    def num_ids(self) -> int:
        """Ids in the parts: a number that is there already, however often it is asked for."""
        return len(self._ids)

    def parts(self) -> list[Part]:
        """The parts, by their names."""
        return [self._parts[name] for name in sorted(self._parts)]

    def done_ids(self) -> set[str]:
        """Ids that are there without an error."""
        done: set[str] = set()
        for part in self._parts.values():
            # A failed id is not done: the next run tries it again.
            done.update(set(part.footer.ids).difference(part.footer.failed))
        return done

    def refresh(self) -> None:
        """Read what others have written since; `TableError` where a file is no part."""
        sizes: dict[str, int] = {}
        indexes = []
        for entry in self._fs.get_file_info(pafs.FileSelector(self._folder, allow_not_found=True)):
            if entry.base_name.endswith(".parquet"):
                sizes[entry.base_name] = entry.size
            elif entry.base_name.endswith(".index") and entry.base_name not in self._indexes:
                indexes.append(entry.base_name)
        with ThreadPoolExecutor(THREADS) as pool:
            for name, parts in zip(indexes, pool.map(self._read_index, indexes), strict=True):
                self._indexes.add(name)
                self._take(self._present(parts, sizes))
            new_names = sizes.keys() - self._parts.keys()
            new_parts = list(pool.map(lambda name: self._read_part(name, sizes[name]), sorted(new_names)))
        self._take(new_parts)
        self._not_indexed += new_parts

    def add(self, part: Part) -> None:
        """Note a part that was written."""
        if part.name not in self._parts:
            self._take([part])
            self._not_indexed.append(part)
        if len(self._not_indexed) >= INDEXED_PARTS:
            self.write_index()

    def write_index(self) -> None:
        """Note the parts that no index file names yet in one."""
        if not self._not_indexed:
            return
        content = "".join(part.to_json() + "\n" for part in self._not_indexed).encode()
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.index"
        write_file(self._fs, f"{self._folder}/{name}", content)
        self._indexes.add(name)
        self._not_indexed = []

    def _take(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self._parts[part.name] = part
            self._ids.update(part.footer.ids)

    def _present(self, parts: Sequence[Part], listed: Collection[str]) -> list[Part]:
        """Those of an index file's parts that are there, also where a store is late to list them."""
        not_listed = [part for part in parts if part.name not in listed]
        infos = self._fs.get_file_info([f"{self._folder}/{part.name}" for part in not_listed])
        gone = {info.base_name for info in infos if not info.is_file}
        return [part for part in parts if part.name not in gone]

    def _read_index(self, name: str) -> list[Part]:
        with self._fs.open_input_stream(f"{self._folder}/{name}", compression=None) as stream:
            lines = stream.read().decode().splitlines()
        return list(map(Part.parse, lines))

    def _read_part(self, name: str, num_bytes: int) -> Part:
        path = f"{self._folder}/{name}"
        try:
            return Part(name, num_bytes, PartFooter.read(self._fs, path))
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            raise TableError(
                f"{path} is not a part file of a table ({error}); delete it and run the step again"
            ) from error
