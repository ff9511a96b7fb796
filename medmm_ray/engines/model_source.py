"""Where a model came from: what it was called there, and which version of it was read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_BLOCK = 1 << 16
_WHOLE = 1 << 26  # bytes of a file up to which it is read whole
_SAMPLES = 256


@dataclass(frozen=True)
class ModelSource:
    """`source`: a hub id, or a folder's (or file's) name. `revision`: the hub's commit, or "content:" and a hash of the
    weight files; None for a model that was never stored."""

    source: str
    revision: str | None

    @classmethod
    def of(cls, source: str | Path, commit: str | None = None) -> "ModelSource":
        """Of a hub id with its commit, or of a local folder or file: its name alone, as paths are nobody's business."""
        path = Path(source)
        return cls(path.resolve().name, content_hash(path)) if path.exists() else cls(str(source), commit)


def commit_of(name: str | Path, file: str, revision: str | None) -> str | None:
    """The commit of the hub that `revision` of `name` stands for, by one of its files; None for a folder.

    Raises OSError where there is no such repository, revision or file.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    return (
        None if Path(name).is_dir() else extract_commit_hash(str(cached_file(str(name), file, revision=revision)), None)
    )


def content_hash(path: Path) -> str:
    """`files_hash` of a folder's weight files, or of one file."""
    return files_hash([path] if path.is_file() else sorted(f for pattern in _WEIGHTS for f in path.glob(pattern)))


def files_hash(files: Sequence[Path]) -> str:
    """A hash of some files: their names, sizes and bytes.

    Of a file over 64 MiB, 256 blocks of 64 KiB from its start to its end are read: training changes all of them, and an
    8B model costs milliseconds instead of a second pass over 16 GB. It tells versions apart; it is no proof against
    someone who forges one.
    """
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                found.update(stream.read())
                continue
            for i in range(_SAMPLES):
                stream.seek(i * (size - _BLOCK) // (_SAMPLES - 1))
                found.update(stream.read(_BLOCK))
    return f"content:{found.hexdigest()[:16]}"
