"""Dataclasses as JSON files and back: what a step hands on that is no table, such as a report.

A field that may be missing in the file has a default: it is left out where it has it. Keys keep the fields' order.
"""

import json
from typing import TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def to_json(document: object) -> bytes:
    """A dataclass, with all those in it, as the bytes of its JSON file."""
    fields = TypeAdapter(type(document)).dump_python(document, exclude_defaults=True)
    return json.dumps(fields, indent=1, allow_nan=False).encode()


def from_json(document_type: type[T], content: bytes) -> T:
    """The dataclass of a JSON file's bytes; raises pydantic's ValidationError where they are none of it."""
    return TypeAdapter(document_type).validate_json(content)
