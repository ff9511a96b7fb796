"""Folders in texts that leave the machine: what a folder is called there is nobody else's concern."""

import re
from typing import Any

_FOLDER = re.compile(r"(?:\b[a-z0-9+]+://|(?<![\w.:/])~?/)[^\s'\",;)\]}]*/")


def without_folders(text: str) -> str:
    """The text with the last part alone of each absolute path and URI.

    >>> without_folders("models /home/anna/run/policy and s3://bucket/base of org/name")
    'models policy and base of org/name'
    """
    return _FOLDER.sub("", text)


def strip_folders(value: Any) -> Any:
    """`without_folders` of every text in plain JSON values."""
    match value:
        case str():
            return without_folders(value)
        case list():
            return list(map(strip_folders, value))
        case dict():
            return {key: strip_folders(inner) for key, inner in value.items()}
    return value
