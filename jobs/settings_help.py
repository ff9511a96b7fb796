"""The settings of a recipe as text for a screen: what people change on one, everything behind ``--help-all``."""

import io
import json
import shutil
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Column, Table

from medmm_ray.config import is_execution
from medmm_ray.config_tree import KIND, Setting, inner_configs, is_by_name, kinds_of, settings
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.vllm_engine import EngineConfig

# Bases whose settings belong to an engine or to an API, and not to what a step makes.
ENGINE_CONFIGS: tuple[type[BaseModel], ...] = (EngineConfig, ApiConfig, ApiEngine)
# What of an engine, of an API and of how a step runs is changed in most runs.
OFTEN_CHANGED = {KIND, "num_actors", "num_gpus", "num_workers", "gpus_per_worker", "count", "max_cost_usd", "run"}


def overview(config: type[BaseModel], section: str | None = None) -> str:
    """The settings that people change, a line each: those of `section`, or `config`'s own and its sections' names."""
    section_type = config if section is None else inner_configs(config.model_fields[section].annotation)[0]
    prefix = "" if section is None else f"{section}."
    rows: list[tuple[str, str, str]] = []
    for name, info in section_type.model_fields.items():
        words = " ".join((info.description or "").split())
        if kinds_of(info):
            rows += _engine_rows(section_type, name, prefix)
        elif inner_configs(info.annotation):
            label = f"{prefix}{name}.<name>.*" if is_by_name(info) else f"{prefix}{name}.*"
            rows.append((label, "", words))
        elif section is None or _is_often_changed(section_type, name, info):
            rows.append((f"{prefix}{name}", _default(info, info.default), words))
    width = shutil.get_terminal_size((120, 40)).columns
    name_width = max(len(name) for name, _, _ in rows)
    default_width = max(min(len(default), 24) for _, default, _ in rows)
    lines = []
    for name, default, words in rows:
        line = f"{name:<{name_width}}  {default:<{default_width}}  {words}".rstrip()
        # A cut line ends at a word, and shows that it is cut.
        lines.append(line if len(line) <= width else f"{line[: width - 1].rpartition(' ')[0]} …")
    total = sum(1 for _ in settings(section_type))
    lines.append(f"{len(rows)} of {total} settings; --help-all shows every one, with its type.")
    return "\n".join(lines)


def _engine_rows(section_type: type[BaseModel], name: str, prefix: str) -> list[tuple[str, str, str]]:
    """The settings of a section's engine that people change, with the kinds that have them."""
    often_changed: set[str] = set()
    kinds = kinds_of(section_type.model_fields[name])
    for config in kinds.values():
        often_changed.update(
            leaf for leaf, info in config.model_fields.items() if _is_often_changed(config, leaf, info)
        )
    if len(kinds) == 1:  # nothing to choose
        often_changed.discard(KIND)
    rows: list[tuple[str, str, str]] = []
    for setting in settings(section_type):
        engine, _, leaf = setting.name.partition(".")
        if engine == name and leaf in often_changed:
            rows.append((f"{prefix}{setting.name}", _default(setting.info, setting.default), _words(setting)))
    # Who answers comes first.
    first = (f"{prefix}{name}.{KIND}", f"{prefix}{name}.model")
    return sorted(rows, key=lambda row: first.index(row[0]) if row[0] in first else len(first))


def all_settings(config: type[BaseModel], section: str | None = None) -> str:
    """Every setting of `config` with its type, default and description, nested ones as ``section.name``.

    Of a recipe with `section` the recipe's own and that section's.
    """
    table = Table(Column("setting", no_wrap=True), "type", "default", "what it sets", box=None, pad_edge=False)
    for setting in settings(config):
        name = setting.name
        if section is None or "." not in name or name.startswith(f"{section}."):
            default = _default(setting.info, setting.default)
            table.add_row(name, _type_name(setting.info.annotation), default, _words(setting))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def _words(setting: Setting) -> str:
    """What a setting sets, after the kinds that have it where not all do."""
    words = " ".join((setting.info.description or "").split())
    return f"{', '.join(setting.kinds)}: {words}" if setting.kinds else words


def _is_often_changed(section_type: type[BaseModel], name: str, info: FieldInfo) -> bool:
    """Whether `name` says what the step makes, or is one of the few others that most runs set."""
    if name in OFTEN_CHANGED:
        return True
    if is_execution(info):
        return False
    return not any(name in base.model_fields for base in ENGINE_CONFIGS if issubclass(section_type, base))


def _default(info: FieldInfo, default: Any) -> str:
    if info.is_required() and default in (None, PydanticUndefined):
        return "(required)"
    return json.dumps(default, default=str)


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
