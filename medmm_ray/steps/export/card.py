"""The card of an exported dataset: what the hub's page says, and the YAML by which `datasets` finds the files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from medmm_ray.text.folders import without_folders

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_DTYPES = {"string": "string", "int64": "int64", "double": "float64", "float": "float32", "bool": "bool"}

_WHAT = """\
# Medical questions with step-labelled solutions

Questions (with their images, where there are any), sampled step-by-step solutions, and labels of each step from the
sources below, side by side. Made with medmm_ray.

A label is 1 (right), 0 (wrong) or null (not labelled, or nothing to check); a judge's and an expert's speak of the
step itself, Monte Carlo's and a tree's value of the solution up to it. Raw labels keep their source's meaning: which
of them to train on, and what to do after a first error, is the reader's choice.
"""


_TO_BE_CHOSEN = (
    "## Before it is used\n\nThe licence above is a placeholder until whoever owns questions and images chose one; "
    "the terms of the sources hold. Labels are made by models unless their source says `expert`; nothing here is "
    "medical advice."
)


@dataclass(frozen=True)
class CardText:
    """What a card says that no table knows: licences as the hub spells them, and its last part, by the counts."""

    licences: tuple[str, ...]
    ending: Callable[[Mapping[str, int]], str] = lambda _: _TO_BE_CHOSEN


def card(
    schema: pa.Schema,
    text: CardText,
    splits: Mapping[str, int],
    counts: Mapping[str, int],
    made_by: Mapping[str, Any],
) -> str:
    """README.md with its YAML front matter; `splits` are questions a split, `counts` what `export` counted."""
    features = _features(schema)
    files = []
    sizes = []
    for split, number in splits.items():
        files.append({"split": split, "path": f"data/{split}-*"})
        sizes.append({"name": split, "num_examples": number})
    # The hub reads these keys: they are its own.
    front = {
        "license": text.licences[0] if len(text.licences) == 1 else list(text.licences),
        "task_categories": ["question-answering", "visual-question-answering"],
        "language": ["en"],
        "tags": ["medical", "process-reward-model", "step-labels"],
        "size_categories": [_size_category(sum(splits.values()))],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {
            "features": features,
            "splits": sizes,
        },
    }
    front_matter = yaml.safe_dump(front, sort_keys=False).rstrip()
    lines = ["---", front_matter, "---", "", *_body(counts, made_by), "", text.ending(counts)]
    return "\n".join(lines) + "\n"


def _size_category(num_questions: int) -> str:
    for limit, name in _SIZES:
        if num_questions < limit:
            return name
    return "n>1M"


def feature(name: str, kind: pa.DataType) -> dict[str, Any]:
    """One Arrow field as the hub's YAML describes it."""
    if pa.types.is_list(kind):
        item = kind.value_type
        if pa.types.is_struct(item):
            return {"name": name, "list": _features(item)}
        return {"name": name, "sequence": _DTYPES[str(item)]}
    if pa.types.is_struct(kind):
        return {"name": name, "struct": _features(kind)}
    return {"name": name, "dtype": _DTYPES[str(kind)]}


def _features(fields: Iterable[pa.Field]) -> list[dict[str, Any]]:
    return [feature(field.name, field.type) for field in fields]


def _body(counts: Mapping[str, int], made_by: Mapping[str, Any]) -> Iterator[str]:
    yield _WHAT
    yield "## Counts\n"
    yield "| what | number |\n|---|---|"
    for name, number in sorted(counts.items()):
        yield f"| {name} | {number:,} |"
    yield "\n## How it was made\n"
    yield "| step | fingerprint | config |\n|---|---|---|"
    for step, (fingerprint, config) in made_by.items():
        # Paths are of the machine that made the table.
        settings = []
        for key, value in config.items():
            if "path" not in key:
                settings.append(f"{key}={_short(value)}")
        yield f"| {step} | `{fingerprint}` | {', '.join(settings)} |"


def _short(value: Any) -> str:
    # A bar or a line break would end the cell of the table.
    text = without_folders(str(value)).replace("|", "/")
    text = text.replace("\n", " ")
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."
