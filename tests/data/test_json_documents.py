"""json_documents.py: a nested dataclass as a file's bytes, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from pydantic import ValidationError

from medmm_ray.data.json_documents import from_json, to_json


@dataclass(frozen=True)
class Mark:
    value: float | None
    target: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Document:
    marks: Mapping[str, list[Mark]]
    gain: Mark | None = None
    errors: Mapping[str, int] = field(default_factory=dict)


def test_a_field_at_its_default_is_left_out_and_one_without_default_is_null() -> None:
    document = Document(marks={"a": [Mark(None, (0.5, None))], "b": []})
    content = (
        b'{\n "marks": {\n  "a": [\n   {\n    "value": null,\n    "target": [\n     0.5,\n     null\n    ]\n   }\n  ],'
    )
    assert to_json(document) == content + b'\n  "b": []\n }\n}'
    assert from_json(Document, to_json(document)) == document


def test_whole_numbers_stay_whole_in_the_file() -> None:
    document = Document(marks={}, gain=Mark(3, (2, None)), errors={"x": 1})
    assert b'"value": 3,' in to_json(document)
    assert from_json(Document, to_json(document)) == document


def test_what_is_no_such_document_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"marks\n  Field required"):
        from_json(Document, b"{}")
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        to_json(Document(marks={"a": [Mark(float("nan"), (None, None))]}))
