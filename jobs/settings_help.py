"""The settings of a recipe as text for a screen: what people change on one, everything behind ``--help-all``."""

import io
import json
import shutil
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from medmm_ray.config import Config, inner_configs, is_execution
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.vllm_engine import EngineConfig

# Bases whose settings belong to an engine or to an API, and not to what a step makes.
ENGINE_CONFIGS: tuple[type[Config], ...] = (EngineConfig, ApiConfig)
# What of the engine, of the API and of how a step runs is changed in most runs.
OFTEN_CHANGED = {"num_actors", "num_gpus", "num_workers", "gpus_per_worker", "max_cost_usd", "run"}


def overview(config: type[Config], section: str | None = None) -> str:
    """The settings that people change, a line each: those of `section`, or `config`'s own and its sections' names."""
    section_type = config if section is None else inner_configs(config.model_fields[section].annotation)[0]
    prefix = "" if section is None else f"{section}."
    rows = []
    for name, info in section_type.model_fields.items():
        if section is None or _is_often_changed(section_type, name, info):
            has_settings = bool(inner_configs(info.annotation))
            label = f"{prefix}{name}.*" if has_settings else f"{prefix}{name}"
            rows.append((label, "" if has_settings else _default(info), " ".join((info.description or "").split())))
    width = shutil.get_terminal_size((120, 40)).columns
    name_width = max(len(name) for name, _, _ in rows)
    default_width = max(min(len(default), 24) for _, default, _ in rows)
    lines = []
    for name, default, words in rows:
        line = f"{name:<{name_width}}  {default:<{default_width}}  {words}".rstrip()
        # A cut line ends at a word, and shows that it is cut.
        lines.append(line if len(line) <= width else f"{line[: width - 1].rpartition(' ')[0]} …")
    total = sum(1 for _ in _leaves(section_type, ""))
    lines.append(f"{len(rows)} of {total} settings; --help-all shows every one, with its type.")
    return "\n".join(lines)


def all_settings(config: type[Config], section: str | None = None) -> str:
    """Every setting of `config` with its type, default and description, nested ones as ``section.name``.

    Of a recipe with `section` the recipe's own and that section's.
    """
    table = Table("setting", "type", "default", "what it sets", box=None, pad_edge=False)
    for name, info in _leaves(config, ""):
        if section is None or "." not in name or name.startswith(f"{section}."):
            table.add_row(name, _type_name(info.annotation), _default(info), info.description or "")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def _is_often_changed(section_type: type[Config], name: str, info: FieldInfo) -> bool:
    """Whether `name` says what the step makes, or is one of the few others that most runs set."""
    if name in OFTEN_CHANGED:
        return True
    if is_execution(info):
        return False
    return not any(name in base.model_fields for base in ENGINE_CONFIGS if issubclass(section_type, base))


def _leaves(config: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in config.model_fields.items():
        inner = inner_configs(info.annotation)
        if inner:
            by_name = "<name>." if get_origin(info.annotation) is dict else ""
            yield from _leaves(inner[0], f"{prefix}{name}.{by_name}")
        else:
            yield f"{prefix}{name}", info


def _default(info: FieldInfo) -> str:
    return "(required)" if info.is_required() else json.dumps(info.default, default=str)


def _type_name(annotation: Any) -> str:
    """A type as a reader of YAML names it: `openai | gemini`, `float | null`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    names = {"NoneType": "null", "str": "text", "bool": "true | false", "int": "integer", "float": "number"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)
