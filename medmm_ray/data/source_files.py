"""Files of data sets: JSON, JSONL and text on any filesystem, and their entries, checked.

Enters: a URI. Leaves: entries with types; a fault is a `ConfigError` (the file) or `TableError` (an entry) that names
the place and what was expected, without the text that stands there.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pyarrow import fs as pafs
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import TableError, filesystem
from medmm_ray.text import LETTERS


def stream_json(uri: str) -> Iterator[Any]:
    """The entries of a file with one JSON list, one by one; a `ConfigError` names the file and the fault.

    A byte order mark is passed over. A list of nothing is a fault too. No text of the file enters a message.
    """
    import ijson

    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check the `path` of its source")
    count = 0
    with fs.open_input_stream(path) as stream:
        start = stream.read(_HEAD_BYTES)
    mark_length = _check_start(uri, start)
    with fs.open_input_stream(path) as stream:
        stream.read(mark_length)
        try:
            # One entry at a time: published files have gigabytes. Floats, as of json.loads, and no Decimals.
            for entry in ijson.items(stream, "item", use_float=True):
                count += 1
                yield entry
        except ijson.JSONError as error:
            raise ConfigError(f"{uri} is not a valid JSON list: {_json_fault(error)} (after {count} entries)") from None
    if not count:
        raise ConfigError(f"{uri} has no entry: expected one JSON list of objects, [{{...}}, {{...}}]")


def _check_start(uri: str, start: bytes) -> int:
    """The length of the byte order mark; a `ConfigError` where the first bytes are not those of a list in UTF-8."""
    if start.startswith(_UTF16_MARKS):
        raise ConfigError(f"{uri} is UTF-16 text; save it as UTF-8")
    mark_length = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    # The parser would read an object to its end and find no list in it.
    if start[mark_length:].lstrip().startswith(b"{"):
        raise ConfigError(
            f"{uri} has no entry: expected one JSON list of objects, [{{...}}, {{...}}], and it begins with an object. "
            "If it has an object a line (JSON lines), make it a list: jq -s . lines.jsonl > list.json. If an object "
            "stands around the list, take the list out of it"
        )
    return mark_length


_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEAD_BYTES = 64  # white space before the first bracket and more


def _json_fault(error: Exception) -> str:
    """What is wrong with JSON in one line, without the text that stands there."""
    words, _, excerpt = str(error).strip().partition("\n")
    constant = re.search(r"-?\b(?:NaN|Infinity)\b", excerpt)
    if constant:
        return (
            f"{constant[0]} stands where JSON has numbers and null alone; write null for a value that is missing "
            "(json.dump(..., allow_nan=False) finds such values when the file is made)"
        )
    return words.rstrip(".")


def files_at(uri: str, ending: str = ".json") -> list[str]:
    """The file itself, or the files of a folder with this ending."""
    fs, path = filesystem(uri)
    return [uri] if fs.get_file_info(path).is_file else list_files(uri, ending)


def read_json(uri: str) -> Any:
    """The JSON value in a file on any filesystem; a `ConfigError` names the file and the fault."""
    try:
        return json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{uri} is not valid JSON: {error}") from None


def read_text(uri: str) -> str:
    """A file's text, without a byte order mark; a `ConfigError` where there is no such file, or it is no UTF-8."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check the `path` of its section in ingest")
    with fs.open_input_stream(path) as stream:
        content: bytes = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri} is not UTF-8 text: {error}; save it as UTF-8") from None


def read_lines(uri: str) -> list[str]:
    """The lines of a text file that are not empty."""
    lines = read_text(uri).split("\n")
    return list(filter(str.strip, lines))


def list_files(uri: str, ending: str) -> list[str]:
    """The files of a folder whose names have this ending, sorted; a `ConfigError` where there is none."""
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    names = []
    for info in infos:
        if info.is_file and info.base_name.endswith(ending):
            names.append(info.base_name)
    if not names:
        raise ConfigError(f"{uri} has no *{ending} file; check the `path` of its source")
    # Sorted: the order of a listing differs between filesystems, and questions keep the order of the files.
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]


# Entries, checked


class Entry(BaseModel):
    """What a source reads of a record in its files, with types; fields without a name here are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)  # strict: a number is no text, and no text a number


EntryT = TypeVar("EntryT", bound=Entry)
# What pydantic calls a wrong type, in the words of a JSON file.
_EXPECTED = {
    "string_type": "text",
    "list_type": "a list",
    "too_short": "a list with something in it",
    "model_type": "an object",
    "float_type": "a number",
}


def checked(entry: type[EntryT], row: Any, where: str) -> EntryT:
    """`row` as an `entry`; a `TableError` names `where`, the first field at fault, and what was expected in it."""
    try:
        return entry.model_validate(row)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        # "solutions[2].answer": where a reader of the file looks.
        parts = []
        for part in fault["loc"]:
            parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        field = "".join(parts).lstrip(".")
        if fault["type"] == "missing":
            fields = sorted(fault["input"])
            raise TableError(f"{where}: the field {field!r} is missing; it has {fields}") from None
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = _EXPECTED.get(fault["type"]) or message
        raise TableError(f"{where}: {field or 'it'} must be {expected}, not {_describe(fault['input'])}") from None


def read_jsonl(entry: type[EntryT], uri: str) -> Iterator[EntryT]:
    """The lines of a JSONL file that are not empty, each as an `entry`; a `TableError` names the line at fault."""
    for number, line in enumerate(read_text(uri).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TableError(f"{uri} line {number} is not valid JSON: {error}") from None
        yield checked(entry, row, f"{uri} line {number}")


def _describe(value: Any) -> str:
    """A wrong value in a message, without what a patient's text could be in."""
    if value is None:
        return "null"
    if isinstance(value, str) and len(value) > 20:
        return f"a text of {len(value)} characters"
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)


def _truth(value: Any) -> bool:
    if value not in (0, 1, "0", "1"):
        raise ValueError("0 or 1, true or false")
    return value in (1, "1")


def _texts(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    # A missing letter would shift the answers behind it.
    if sorted(value) != list(LETTERS[: len(value)]):
        raise ValueError(f"a list, or texts by their letters from A on; it has {sorted(value)}")
    return [value[letter] for letter in sorted(value)]


def _text(value: Any) -> Any:
    return "" if value is None else value


Words = Annotated[str, BeforeValidator(_text)]
"""A text; null is an empty one."""
Truth = Annotated[bool, BeforeValidator(_truth)]
"""True or false, 1 or 0, as numbers or texts."""
Texts = Annotated[list[str], BeforeValidator(_texts)]
"""A list of texts; one text is a list of one, null an empty one."""
Options = Annotated[list[str], BeforeValidator(_options)]
"""A list of texts, or an object {"A": text, "B": text, …}."""
