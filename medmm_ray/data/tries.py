"""A try at an artifact: its files lie apart until all are there, so that two drivers of one run do each other no harm.

``<artifact>/.tries/<number>`` holds the files of a try; a number is given once. A try that is whole is sealed and
stands for election: one wins, by a file that can be created once, and its files are put in their place, the manifest
last. Nobody's files change after they are sealed, so that it does not matter who puts them there, how often, nor who
was killed in between. The other tries take the winner's artifact as their own.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from medmm_ray.data.artifacts import (
    MANIFEST,
    Artifact,
    Manifest,
    Provenance,
    TableError,
    create_file,
    delete_folder,
    files_below,
    name_below,
    place_file,
    read_file,
)

log = logging.getLogger("medmm_ray")
TRIES = ".tries"
WINNER = "winner.json"
CLAIM = ".claim"
SEALED = ".sealed"


def make(
    artifact: Artifact,
    provenance: Provenance,
    write: Callable[[str], dict[str, float]],
    seconds: Callable[[], float],
    resumes: bool = False,
    began: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Make an artifact by ``write(folder)``, which gives figures for its manifest, or take what another try has made.

    With `resumes` a try goes on with what the one before it had written, and that one ends. `seconds` gives those for
    the manifest; `began` is called with the folder. Raises what `write` raises, and `TableError` where a later try has
    taken over.
    """
    artifact.prepare()
    attempt = begin(artifact, resumes)
    if attempt is None:
        return artifact.manifest()
    began(attempt.uri)
    try:
        figures = write(attempt.uri)
        return attempt.commit(provenance, seconds(), figures)
    except Exception as error:
        if artifact.is_complete:
            log.info("%s: another run was first; its result is taken", artifact.uri)
            _delete_all(artifact)
            return artifact.manifest()
        if attempt.is_superseded:
            raise TableError(
                f"a later run has taken over {artifact.uri} and goes on with what this one had reached; this one ends"
            ) from error
        raise


@dataclass(frozen=True)
class Try:
    """The `number`-th try at an artifact; `uri` is the folder to write to."""

    artifact: Artifact
    number: int
    resumes: bool

    @property
    def uri(self) -> str:
        """The folder of this try's files."""
        return f"{self.artifact.uri}/{TRIES}/{self.number}"

    @property
    def is_superseded(self) -> bool:
        """Whether a later try has begun and may have taken the files over."""
        if not (self.resumes and isinstance(self.artifact.fs, pafs.LocalFileSystem)):
            return False  # it has a copy, or nothing
        return max(_claims(self.artifact), default=0) > self.number

    def commit(self, provenance: Provenance, seconds: float, figures: dict[str, float] | None = None) -> Manifest:
        """Seal the files and have the artifact complete, with them or with another try's that was first.

        Raises `TableError` where a later try has taken the files over.
        """
        if self.is_superseded:  # half of them may be there, and the rest here
            raise TableError(f"a later try has taken over {self.uri}")
        Artifact(self.uri, self.artifact.fs).commit(provenance, seconds, figures)
        try:
            name = _seal(self.artifact, self.number)
        except FileNotFoundError as error:
            raise TableError(f"a later try has taken over {self.uri}") from error
        return _elect(self.artifact, name)


def begin(artifact: Artifact, resumes: bool = False) -> Try | None:
    """A new try; None where a try that was killed had come so far that the artifact is complete now.

    With `resumes` it goes on with the files of the try before it, which is taken for dead: if it is not, it finds its
    folder empty. (On an object store it gets a copy.)
    """
    if _complete(artifact) is not None:
        return None
    number = _claim(artifact)
    attempt = Try(artifact, number, resumes)
    folder = f"{artifact.path}/{TRIES}/{number}"
    if not (resumes and _take_over(artifact, number)):
        artifact.fs.create_dir(folder, recursive=True)
    return attempt


def _complete(artifact: Artifact) -> Manifest | None:
    """Complete the artifact with a sealed try, if there is one."""
    winner = read_file(artifact.fs, f"{artifact.path}/{TRIES}/{WINNER}")
    if winner is not None:
        return _publish(artifact, json.loads(winner)["folder"])
    for name in _folders(artifact):
        if _is_sealed(artifact, name):
            return _elect(artifact, name)
    return None


def _claim(artifact: Artifact) -> int:
    """A number that no other try has, higher than those before it."""
    artifact.fs.create_dir(f"{artifact.path}/{TRIES}", recursive=True)
    number = max(_claims(artifact), default=0) + 1
    while not create_file(artifact.fs, f"{artifact.path}/{TRIES}/{number}{CLAIM}", b""):
        number += 1
    return number


def _take_over(artifact: Artifact, number: int) -> bool:
    """Give try `number` the files of the last one before it; False where there are none."""
    root = f"{artifact.path}/{TRIES}"
    earlier = [int(name) for name in _folders(artifact) if name.isdigit() and int(name) < number]
    for previous in sorted(earlier, reverse=True):
        if isinstance(artifact.fs, pafs.LocalFileSystem):
            with suppress(FileNotFoundError):  # sealed, or taken by another one, at this moment
                Path(root, str(previous)).rename(Path(root, str(number)))
                return True
        else:
            _place_all(artifact.fs, f"{root}/{previous}", f"{root}/{number}")
            return True
    return False


def _seal(artifact: Artifact, number: int) -> str:
    """Make a try's files its own for good; gives the folder's name."""
    if not isinstance(artifact.fs, pafs.LocalFileSystem):
        return str(number)  # nobody takes it; its manifest is there
    root, name = Path(artifact.path, TRIES), f"{number}{SEALED}"
    # The manifest alone is no seal: between it and the election another try could take the folder over.
    (root / str(number)).rename(root / name)
    return name


def _is_sealed(artifact: Artifact, name: str) -> bool:
    if isinstance(artifact.fs, pafs.LocalFileSystem):
        return name.endswith(SEALED)
    info = artifact.fs.get_file_info(f"{artifact.path}/{TRIES}/{name}/{MANIFEST}")
    return bool(info.type == pafs.FileType.File)


def _elect(artifact: Artifact, name: str) -> Manifest:
    """Let the sealed try `name` win, if none has yet; the artifact is complete with the one that has."""
    path = f"{artifact.path}/{TRIES}/{WINNER}"
    try:
        create_file(artifact.fs, path, json.dumps({"folder": name}).encode())
    except TableError:
        if not artifact.is_complete:  # else all tries are gone with their folder
            raise
    winner = read_file(artifact.fs, path)
    return _publish(artifact, name if winner is None else json.loads(winner)["folder"])


def _publish(artifact: Artifact, name: str) -> Manifest:
    """Put the winner's files in their place, then its manifest; all tries go."""
    if not artifact.is_complete:
        with suppress(FileNotFoundError):  # another one was faster, which `manifest` finds out
            _place_files(artifact, f"{artifact.path}/{TRIES}/{name}")
    manifest = artifact.manifest()
    artifact.point(manifest.fingerprint)
    _delete_all(artifact)
    return manifest


def _delete_all(artifact: Artifact) -> None:
    """Delete the tries at a complete artifact, also those that go on."""
    delete_folder(artifact.fs, f"{artifact.path}/{TRIES}")


def _place_files(artifact: Artifact, folder: str) -> None:
    manifest = read_file(artifact.fs, f"{folder}/{MANIFEST}")
    if manifest is None:
        raise FileNotFoundError(f"{folder}/{MANIFEST}")
    _place_all(artifact.fs, folder, artifact.path)
    create_file(artifact.fs, f"{artifact.path}/{MANIFEST}", manifest)


def _place_all(fs: pafs.FileSystem, folder: str, target_folder: str) -> None:
    """Give each file of a folder but the manifest its place in another."""
    # One by one: `copy_files` of a folder refuses filesystems that name paths another way.
    for source in files_below(fs, folder):
        name = name_below(folder, source.path)
        if name != MANIFEST:
            target = f"{target_folder}/{name}"
            fs.create_dir(target.rpartition("/")[0], recursive=True)
            place_file(fs, source.path, target)


def _folders(artifact: Artifact) -> list[str]:
    """Names of the folders of tries."""
    selector = pafs.FileSelector(f"{artifact.path}/{TRIES}", allow_not_found=True)
    return [entry.base_name for entry in artifact.fs.get_file_info(selector) if not entry.is_file]


def _claims(artifact: Artifact) -> list[int]:
    selector = pafs.FileSelector(f"{artifact.path}/{TRIES}", allow_not_found=True)
    names = [entry.base_name for entry in artifact.fs.get_file_info(selector)]
    return [int(name.removesuffix(CLAIM)) for name in names if name.endswith(CLAIM)]
