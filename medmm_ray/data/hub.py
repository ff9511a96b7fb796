"""Folders to the Hugging Face hub.

`HF_ENDPOINT` names another hub, `HF_TOKEN` who is asking (or `token`), as everywhere in huggingface_hub.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def upload(
    folder: Path,
    repo_id: str,
    kind: Literal["model", "dataset"],
    private: bool | None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "",
    patterns: Sequence[str] | None = None,
) -> str:
    """Put a folder's files into a repository, made where it does not exist; gives the commit's address.

    `patterns` are those of the files that go along; None: all.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type=kind,
        folder_path=folder,
        allow_patterns=None if patterns is None else list(patterns),
        revision=revision,
        commit_message=commit_message,
    )
    return str(commit.commit_url)
