"""A reward model from the Hugging Face hub: the whole folder of `checkpoint.write`; `data.hub` brings it there.

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
