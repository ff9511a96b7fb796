"""A reward model on the Hugging Face hub: the whole folder of `checkpoint.write`, there and back.

`HF_ENDPOINT` names another hub, `HF_TOKEN` who is asking (or `token`), as everywhere in huggingface_hub.
"""

from pathlib import Path

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md"]  # all that is written, and no pickle


def fetched(path: str | Path, config: str, revision: str | None) -> str | Path:
    """The local copy of a hub id whose repository has the file `config`; anything else as it is.

    Raises OSError where the repository or the revision does not exist.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file, extract_commit_hash

    if Path(path).is_dir():
        return path
    file = cached_file(
        str(path),
        config,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return path
    return snapshot_download(str(path), revision=extract_commit_hash(file, None), allow_patterns=FILES)


def upload(
    folder: Path, repo_id: str, private: bool | None, token: str | None, revision: str | None, commit_message: str
) -> str:
    """Put a folder's files into a model repository, made where it does not exist; gives the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=FILES, revision=revision, commit_message=commit_message
    )
    return str(commit.commit_url)
