"""Filesystems that fsspec opens, as pyarrow's, with their passing faults waited out.

pyarrow's own filesystems of S3 and Google try again by themselves; what fsspec opens raises at the first time-out.
Worse, pyarrow's `FSSpecHandler` asks fsspec's `isfile`, `isdir`, `exists` and `find`, which take any fault for "is not
there": one time-out would make a table in the making look empty, and a result that is complete look unfinished. Here
only the store itself says that there is no such file. Nor is a listing that fsspec has cached taken for the store's:
another process may have written since.
"""

import errno
import io
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

log = logging.getLogger("medmm_ray")
Value = TypeVar("Value")

ATTEMPTS = 8
PAUSE_S = 0.1
"""Longest pause after the first fault; it doubles with each: 12.7 s in all."""
RETRIED_BYTES = 512 << 20
"""A file up to this size is held until it is whole, and put again where the put fails; a larger one is streamed."""

_LASTING_KINDS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    io.UnsupportedOperation,
)
_LASTING_CODES = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.EOPNOTSUPP,
}


class StorageError(OSError):
    """A storage that went on failing; the message says at what, where, how often and what to do."""


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed later: not where a file, space or permission is missing, nor when tried out."""
    return not isinstance(error, (*_LASTING_KINDS, StorageError)) and error.errno not in _LASTING_CODES


def retried(call: Callable[[], Value], what: str) -> Value:
    """What `call` gives, called again after pauses where the storage fails in passing; `what` is being done, and where.

    Raises `StorageError` after the last attempt, and any other error at once. A failed call may have had its effect.
    """
    began = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OSError as error:
            if not is_transient(error):
                raise
            fault = error
        log.warning("%s: %s (attempt %d of %d)", what, _words(fault), attempt, ATTEMPTS)
        if attempt < ATTEMPTS:
            time.sleep(random.uniform(0.5, 1.0) * PAUSE_S * 2 ** (attempt - 1))
    raise StorageError(
        f"{what} failed {ATTEMPTS} times in {time.monotonic() - began:.1f} s: {_words(fault)}. What is written so far "
        "is kept: run again when the storage answers"
    ) from fault


def _words(error: OSError) -> str:
    return str(error) or type(error).__name__  # a time-out says nothing


class PatientHandler(pafs.FSSpecHandler):  # type: ignore[misc]
    """pyarrow's handler of a filesystem of fsspec; see the module."""

    def get_file_info(self, paths: Iterable[str]) -> list[pafs.FileInfo]:
        """What lies at each of the paths."""
        return [self._file_info(path) for path in paths]

    def _file_info(self, path: str) -> pafs.FileInfo:
        try:
            entry = self._entry(path)
        except FileNotFoundError:
            return pafs.FileInfo(path, pafs.FileType.NotFound)
        return self._create_file_info(path, entry)

    def _entry(self, path: str) -> dict[str, Any]:
        """What fsspec says of a path; raises FileNotFoundError where the store has nothing there."""
        self.fs.invalidate_cache(path)
        entry: dict[str, Any] = retried(lambda: self.fs.info(path), f"looking at {path}")
        return entry

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """What lies in a folder; with `recursive` in those below it too."""
        try:
            if self._entry(selector.base_dir)["type"] == "file":
                raise NotADirectoryError(selector.base_dir)
            entries = self._list(selector.base_dir)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        if selector.recursive:
            entries += self._below(entries)
        return [self._create_file_info(entry["name"], entry) for entry in entries]

    def _list(self, folder: str) -> list[dict[str, Any]]:
        entries = retried(lambda: self.fs.ls(folder, detail=True), f"listing {folder}")
        # Some stores have an object of a folder's own name.
        return [entry for entry in entries if entry["name"].strip("/") != folder.strip("/")]

    def _below(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            if entry["type"] == "directory":
                with suppress(FileNotFoundError):  # it went meanwhile
                    inner = self._list(entry["name"])
                    yield from inner
                    yield from self._below(inner)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Make a folder where there is none."""
        create = super().create_dir
        retried(lambda: create(path, recursive), f"making {path}")

    def delete_dir(self, path: str) -> None:
        """Delete a folder with all that is in it; raises FileNotFoundError where there is none."""
        self._entry(path)
        self._delete(lambda: self.fs.rm(path, recursive=True), path)

    def delete_file(self, path: str) -> None:
        """Delete a file; raises FileNotFoundError where there is none."""
        if self._entry(path)["type"] == "directory":
            raise IsADirectoryError(path)
        self._delete(lambda: self.fs.rm_file(path), path)

    def _delete(self, delete: Callable[[], None], path: str) -> None:
        with suppress(FileNotFoundError):  # a failed attempt has deleted it all the same, or somebody else has
            retried(delete, f"deleting {path}")

    def move(self, src: str, dest: str) -> None:
        """Give a file another name."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file."""
        retried(lambda: self.fs.cp_file(src, dest), f"copying {src} to {dest}")

    def create_file(self, path: str, content: bytes) -> None:
        """Write a whole file; raises FileExistsError where there is one, be it by an attempt of this that failed."""
        # Looked for here: fsspec's plain way to create asks `exists`, and would replace the file where that fails.
        if self._file_info(path).type != pafs.FileType.NotFound:
            raise FileExistsError(path)
        retried(lambda: self.fs.pipe_file(path, content, mode="create"), f"writing {path}")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """A file to read."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        """A file to read at any place."""
        if self._entry(path)["type"] != "file":
            raise FileNotFoundError(path)
        return pa.PythonFile(_Input(self.fs, path), mode="r")

    def open_output_stream(self, path: str, _: object) -> pa.PythonFile:
        """A file to write, which is there when it is closed."""
        return pa.PythonFile(_Output(self.fs, path), mode="w")


class _Input(io.RawIOBase):
    """A file of fsspec to read, opened again where a reading fails."""

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self._fs, self._path = fs, path
        self._file: Any = retried(lambda: fs.open(path, "rb"), f"opening {path}")
        self._is_broken = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        return retried(lambda: self._read(start, -1 if size is None else size), f"reading {self._path}")

    def _read(self, start: int, size: int) -> bytes:
        if self._is_broken:
            self._file = self._fs.open(self._path, "rb")
            self._file.seek(start)
            self._is_broken = False
        try:
            return bytes(self._file.read(size))
        except OSError:
            self._is_broken = True
            raise

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Output(io.RawIOBase):
    """A file of fsspec to write: put whole when it is closed, unless it is too large to be held."""

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self._fs, self._path = fs, path
        self._buffer = io.BytesIO()
        self._sink: Any = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        if self._sink is None and self._buffer.tell() + len(content) > RETRIED_BYTES:
            self._sink = self._fs.open(self._path, "wb")
            self._sink.write(self._buffer.getbuffer())
            self._buffer = io.BytesIO()
        return int((self._sink or self._buffer).write(content))

    def close(self) -> None:
        if self.closed:
            return
        super().close()  # first: whoever closes it again, after a fault, must not write it
        if self._sink is not None:
            self._sink.close()
        else:
            content = self._buffer.getvalue()
            retried(lambda: self._fs.pipe_file(self._path, content), f"writing {self._path}")
