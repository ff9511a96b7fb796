"""What a config class is made of: its settings by dotted name, and the sections that a setting may hold.

A setting may hold a section of one of several kinds, told apart by their field `kind` (an engine: vllm, gemini ...), a
dict of sections by name (``apis``), or a list of them (``ingest.sources``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KIND = "kind"


@dataclass(frozen=True)
class Setting:
    """A setting by its dotted name; `kinds` are those of its section that have it, none where all do."""

    name: str
    info: FieldInfo
    default: Any
    kinds: tuple[str, ...] = ()


def inner_configs(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting of this annotation may hold: one for `JudgeConfig | None`, none for `int`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    configs: list[type[BaseModel]] = []
    for argument in get_args(annotation):
        configs += inner_configs(argument)
    return configs


def is_by_name(info: FieldInfo) -> bool:
    """Whether a setting holds sections by name."""
    return get_origin(info.annotation) is dict and bool(inner_configs(info.annotation))


def is_listed(info: FieldInfo) -> bool:
    """Whether a setting holds a list of sections."""
    return get_origin(info.annotation) is tuple and bool(inner_configs(info.annotation))


def kinds_of(info: FieldInfo) -> dict[str, type[BaseModel]]:
    """The sections that a setting may hold, by their kind; empty where it holds none with kinds."""
    kinds: dict[str, type[BaseModel]] = {}
    for config in inner_configs(info.annotation):
        annotation = config.model_fields[KIND].annotation if KIND in config.model_fields else None
        if get_origin(annotation) is Literal:
            kinds |= dict.fromkeys(get_args(annotation), config)
    return kinds


def settings(config: type[BaseModel], prefix: str = "", default: BaseModel | None = None) -> Iterator[Setting]:
    """All settings of a config, those of its sections after their names; `default` is the config's where it is set."""
    for name, info in config.model_fields.items():
        value = getattr(default, name) if default is not None else info.default
        part_default = value if isinstance(value, BaseModel) else None
        parts = inner_configs(info.annotation)
        if len(kinds_of(info)) > 1:
            yield from _settings_of_kinds(f"{prefix}{name}.", kinds_of(info), part_default)
        elif parts:
            by_name = "<name>." if is_by_name(info) else ""
            if is_listed(info):
                by_name = "<number>."
            yield from settings(parts[0], f"{prefix}{name}.{by_name}", part_default)
        else:
            yield Setting(f"{prefix}{name}", info, value)


def _settings_of_kinds(
    prefix: str, kinds: Mapping[str, type[BaseModel]], default: BaseModel | None
) -> Iterator[Setting]:
    """The settings of a section that has kinds: the kind, then each setting once for all kinds that share it."""
    default_kind = getattr(default, KIND) if default is not None else None
    yield Setting(
        f"{prefix}{KIND}",
        _kind_field(kinds),
        default_kind,
    )
    # Of two kinds a setting of one name may say different things, as `model` does: then it has a line for each.
    kinds_with: dict[tuple[str, str], list[str]] = {}
    infos: dict[tuple[str, str], FieldInfo] = {}
    for kind, config in kinds.items():
        for name, info in config.model_fields.items():
            if name == KIND:
                continue
            meaning = f"{info.description} {info.default}"
            kinds_with.setdefault((name, meaning), []).append(kind)
            infos.setdefault((name, meaning), info)
    for (name, meaning), kinds_of_setting in kinds_with.items():
        info = infos[name, meaning]
        is_everywhere = len(kinds_of_setting) == len(kinds)
        is_of_default = default_kind in kinds_of_setting
        yield Setting(
            f"{prefix}{name}",
            info,
            default=getattr(default, name) if is_of_default else info.default,
            kinds=() if is_everywhere else tuple(kinds_of_setting),
        )


def _kind_field(kinds: Mapping[str, type[BaseModel]]) -> FieldInfo:
    """The field `kind` of a section that has several: one of them, with what each says of itself."""
    words: list[str] = []
    for config in dict.fromkeys(kinds.values()):
        description = config.model_fields[KIND].description
        if description:
            words.append(description.removesuffix("."))
    return FieldInfo(annotation=cast(Any, Literal[tuple(kinds)]), description="; ".join(words) + ".")
