"""A data set of the Hugging Face hub in a folder, whole, at one commit.

Enters: its name, a revision, a folder. Leaves: the files; a marker, written last, says which commit they are of, so
that a folder with it is complete and asks nobody.
"""

import json
import re
from pathlib import Path

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import filesystem, write_file

MARKER = ".hub_revision.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(hub: str, revision: str, folder: str) -> None:
    """All files of a data set of the hub at a revision; a `ConfigError` where it refuses, or cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(hub, repo_type="dataset", revision=revision, local_dir=folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        words = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{hub} at {revision} could not be downloaded: {type(error).__name__}: {words} Accept its terms on the "
            "hub and set HF_TOKEN where it asks for that"
        ) from None


def ensure(hub: str, revision: str, folder: str) -> None:
    """`download` into a folder that has not these files yet; a `ConfigError` where it has others.

    The revision is a commit: a branch may name other files tomorrow, and a run would not notice.
    """
    if not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"ingest.sources: the revision of {hub} is {revision!r}; expected the 40 digits of a commit, as the hub's "
            "page of its files shows them: what a branch or tag names can change"
        )
    if "://" in folder:
        raise ConfigError(
            f"ingest.sources: {hub} is downloaded into a folder, and path is {folder}; name one on a disk that every "
            "node reaches, or upload it there and leave hub out"
        )
    expected = {"hub": hub, "revision": revision}
    marker = Path(folder) / MARKER
    if marker.is_file():
        present = json.loads(marker.read_text())
        if present != expected:
            raise ConfigError(
                f"{folder} has {present['hub']} at {present['revision']}, and the source asks for {hub} at {revision}; "
                "name another folder"
            )
        return
    download(hub, revision, folder)
    write_file(*filesystem(str(marker)), json.dumps(expected).encode())
