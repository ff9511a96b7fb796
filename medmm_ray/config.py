"""What a config is: frozen, flat, strict; a recipe file, then ``name=value`` overrides.

Enters: a YAML recipe (it may ``extends:`` another) and overrides. Leaves: a validated pydantic model, the fields that
identify a result (`identity`), and the help text. A field's docstring is its description, with its unit.

No library does all of it: Hydra composes recipes and reads overrides, but takes over a program's start and checks
neither literals nor bounds; pydantic checks everything, and is used for that, but knows no recipes and no identity.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from medmm_ray.config_tree import KIND, inner_configs, is_by_name, is_listed, kinds_of, settings

JsonObject = dict[str, Any]
"""An object of JSON: what reports are made of."""

Split = Literal["train", "validation", "test"]


def _at_least_one(splits: tuple[Split, ...]) -> tuple[Split, ...]:
    if not splits:
        raise ValueError("name one split or more, or leave the step out (without)")
    return splits


Splits = Annotated[tuple[Split, ...], AfterValidator(_at_least_one)]
"""One split or more."""

ConfigT = TypeVar("ConfigT", bound="Config")
T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and what was expected."""


class Config(BaseModel):
    """Base of every config: unknown names, wrong types, infinity and NaN are errors, instances immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values as given, over what the defaults of their sections set; before they are validated.

        Of a section with the default ``Training(rate=1.0)`` that is given as ``{epochs: 2}``, the rate stays 1.0.
        """
        sections = {}
        for name, info in cls.model_fields.items():
            if name in values and isinstance(info.default, Config):
                sections[name] = _set_values(info.default)
        return _merge(_with_kinds(cls, sections), values)


def execution(
    default: T,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> T:
    """A field that says how a step runs, not what it makes (pool sizes, batch sizes, paths): not part of `identity`."""
    field: T = Field(
        default,
        ge=ge,
        gt=gt,
        le=le,
        json_schema_extra={"identity": False},
    )
    return field


def identity(config: Config) -> dict[str, Any]:
    """The fields that decide what a step makes, nested configs included, as plain JSON values.

    How settings are grouped is no part of it: the fields of an engine stand beside those of its section.
    """
    values: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        if is_execution(info):
            continue
        value = getattr(config, name)
        kinds = kinds_of(info)
        if kinds:
            values |= _engine_identity(kinds, value)
        elif is_listed(info):
            values[name] = list(map(identity, value))
        else:
            values[name] = identity(value) if isinstance(value, Config) else value
    # Through JSON: a tuple and the list that a manifest gives back are then equal.
    plain_values = json.loads(json.dumps(values, sort_keys=True))
    return cast(dict[str, Any], plain_values)


def _engine_identity(kinds: Mapping[str, type[BaseModel]], engine: Config | None) -> dict[str, Any]:
    """The fields of all kinds of an engine, those that the chosen kind does not have at their defaults.

    So a section has the same names whatever its engine, and seeds that are made of them do not depend on what other
    kinds there are.
    """
    values: dict[str, Any] = {}
    for config in kinds.values():
        for name, info in config.model_fields.items():
            if name != KIND and not is_execution(info):
                values[name] = None if info.is_required() else info.default
    chosen_kind = "none"
    if engine is not None:
        values |= identity(engine)
        chosen_kind = values.pop(KIND)
    if len(kinds) > 1:
        values["backend"] = chosen_kind  # its name in every fingerprint so far
    return values


def is_execution(info: FieldInfo) -> bool:
    """Whether a field was made by `execution`."""
    extra = info.json_schema_extra
    return isinstance(extra, dict) and extra.get("identity") is False


def digest(*parts: object) -> str:
    """A 16-character content hash of JSON-able values: the same parts give the same id on every machine."""
    # All ids and fingerprints rest on these bytes: another separator would rename every row.
    text = json.dumps(
        parts,
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 floats and each name once: PyYAML alone reads ``1e-4`` as text, and of two values drops one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, refused where it has a name twice."""
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice; write it once", key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    """A YAML text as plain values."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe's raw values, the recipes it ``extends:`` (paths beside it) merged underneath."""
    values: dict[str, Any] = {}
    for layer in _layers(Path(path), ()):
        values = _merge(values, layer)
    return values


def _layers(path: Path, above: Sequence[Path]) -> list[dict[str, Any]]:
    """The raw values of a recipe and of those that it extends, the lowest first."""
    try:
        raw = _parse(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; the shipped ones are in jobs/recipes/") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is no text; name a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must hold 'section: {{name: value}}' entries, got {type(raw).__name__}")
    parent = raw.pop("extends", None)  # no setting: the recipes underneath are read here
    if parent is None:
        return [raw]
    if not isinstance(parent, str):
        raise ConfigError(f"recipe {path}: 'extends' is {parent!r}; it names one recipe, by its path beside this one")
    above = [*above, path.resolve()]
    if (path.parent / parent).resolve() in above:
        raise ConfigError(f"recipe {path} extends {parent}, which extends it in turn; a recipe cannot be its own base")
    return [*_layers(path.parent / parent, above), raw]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, those of `above` where both have one; sections are merged in turn.

    A section that names another kind than the one below replaces it: what another engine was told means nothing to it.
    """
    merged = dict(below)
    for key, value in above.items():
        below_value = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below_value, list):
            merged[key] = _merge_entries(key, below_value, value)
        elif not isinstance(value, Mapping) or not isinstance(below_value, Mapping):
            merged[key] = value
        elif KIND in value and KIND in below_value and value[KIND] != below_value[KIND]:
            merged[key] = dict(value)
        else:
            merged[key] = _merge(below_value, value)
    return merged


def _merge_entries(name: str, entries: Sequence[Any], changes: Mapping[Any, Any]) -> list[Any]:
    """A list of sections with the changes of some, by their places from 0; the place behind the last adds one."""
    merged = list(entries)
    for place, change in changes.items():
        if not str(place).isdigit() or int(place) > len(merged):
            raise ConfigError(
                f"{name} is a list of {len(entries)}: {place!r} is no place in it. Write {name}.0.<setting>=<value>, "
                f"or all of it as {name}=[{{...}}]"
            )
        if int(place) == len(merged):
            merged.append(change)
        elif isinstance(merged[int(place)], Mapping) and isinstance(change, Mapping):
            merged[int(place)] = _merge(merged[int(place)], change)
        else:
            merged[int(place)] = change
    return merged


def parse_overrides(
    overrides: Iterable[str],
    config: type[Config] | None = None,
    section: str | None = None,
) -> dict[str, Any]:
    """``a.b=value`` words as a nested dict, values read as YAML.

    A name without a dot that is no field of `config` belongs to `section`, the section of the step that is run. In a
    dict of sections the key may have dots, as names of models do: it is all between the first dot and the last.
    """
    fields = config.model_fields if config else {}
    nested: dict[str, Any] = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"override {word!r} is not of the form name=value, e.g. sample.temperature=0.7")
        if section and "." not in name and name not in fields:
            name = f"{section}.{name}"
        try:
            leaf: Any = _parse(value)
        except yaml.YAMLError:
            raise ConfigError(f"override {word!r}: the value is not valid YAML; quote it") from None
        for key in reversed(_split(name, leaf, fields)):  # a.b=1 -> {a: {b: 1}}
            leaf = {key: leaf}
        nested = _merge(nested, leaf)
    return nested


def _split(name: str, value: Any, fields: Mapping[str, FieldInfo]) -> list[str]:
    """The parts of a dotted name that is given `value`; in a dict of sections all of the key is one part."""
    first, _, rest = name.partition(".")
    if not rest or first not in fields or not is_by_name(fields[first]):
        return name.split(".")
    key, _, setting = rest.rpartition(".")
    # A whole section may be given too, and its key have dots.
    if isinstance(value, Mapping) and not any(
        setting in part.model_fields for part in inner_configs(fields[first].annotation)
    ):
        return [first, rest]
    if not key:
        raise ConfigError(f"{name}={value} names no setting of {rest}: write {first}.{rest}.<setting>=<value>")
    return [first, key, setting]


def build(config: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Validate `values` as a `config`; a fault is a `ConfigError` that names `where`, the key and what was expected."""
    try:
        # The JSON rules: strict, but a YAML list may become a tuple.
        return config.model_validate_json(json.dumps(_with_kinds(config, config.completed(values))))
    except ValidationError as error:
        # All faults at once: a recipe is mended in one go.
        lines = []
        for fault in error.errors(include_url=False):
            lines.append(f"{where}: {_explain(config, fault)}")
        raise ConfigError("\n".join(lines)) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; a recipe holds text, numbers, true/false and lists") from None


def load(
    config: type[ConfigT],
    recipe: str | Path | None,
    overrides: Sequence[str] = (),
    section: str | None = None,
) -> ConfigT:
    """A recipe file and overrides as a validated config."""
    layers = _layers(Path(recipe), ()) if recipe else []
    values: dict[str, Any] = {}
    # Kinds before each layer: whether it names another one is seen only where the lower one's default stands there too.
    for layer in (*layers, parse_overrides(overrides, config, section)):
        values = _merge(_with_kinds(config, values), layer)
    return build(config, values, str(recipe or "arguments"))


def _set_values(config: Config) -> dict[str, Any]:
    """What a config was given, and the kind of each part that has one."""
    values = config.model_dump(exclude_unset=True)
    # pydantic leaves out a kind that is its class's default, and then nothing says which class it was.
    for name in values:
        value = getattr(config, name)
        if isinstance(value, Config):
            values[name] = _set_values(value)
    if KIND in type(config).model_fields:
        values[KIND] = getattr(config, KIND)
    return values


def _with_kinds(config: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the default kind of each section that has kinds and names none."""
    completed = dict(values)
    for name, value in values.items():
        info = config.model_fields.get(name)
        if info is None or not isinstance(value, Mapping) or is_by_name(info):
            continue
        if is_listed(info):
            defaults = list(map(_set_values, info.default))
            completed[name] = _merge_entries(name, defaults, value)
            continue
        if kinds_of(info):
            if isinstance(info.default, Config):
                completed[name] = {KIND: getattr(info.default, KIND), **value}
        elif parts := inner_configs(info.annotation):
            completed[name] = _with_kinds(parts[0], value)
    return completed


def _explain(config: type[Config], fault: Any) -> str:
    """One fault of pydantic's in the words of a recipe."""
    place = _place_of(config, fault["loc"])
    key = ".".join(place.path)
    kinds = ", ".join(kinds_of(place.info)) if place.info else ""
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of a whole config: it names its settings
        return ": ".join([*place.path, str(fault["ctx"]["error"])])
    if fault["type"] == "extra_forbidden":
        return f"unknown name {key!r}; {_hint(config, place)}"
    if fault["type"] == "union_tag_not_found":
        return f"'{key}.{KIND}' is required; it is one of {kinds}"
    if fault["type"] == "union_tag_invalid":
        return f"'{key}.{KIND}' is {fault['ctx']['tag']!r}; it is one of {kinds}"
    if kinds and not isinstance(fault["input"], dict):
        return f"{key!r} is {fault['input']!r}; it is a section: name its kind as {key}.{KIND}=... (one of {kinds})"
    if fault["type"] == "missing":
        return f"{key!r} is required; set it in the recipe or as {key}=..."
    return f"{key!r} is {fault['input']!r}: {fault['msg'].removeprefix('Value error, ')}"


@dataclass(frozen=True)
class _Place:
    """Where a fault lies: the names that lead there, the sections that may hold the last of them, and its field."""

    path: list[str]
    sections: Sequence[type[BaseModel]]
    info: FieldInfo | None


def _place_of(config: type[BaseModel], location: Sequence[str | int]) -> _Place:
    """The place of a fault's location; a recipe has no name for the kind that pydantic puts behind a section's name."""
    path: list[str] = []
    sections: Sequence[type[BaseModel]] = []
    info: FieldInfo | None = None
    next_sections: Sequence[type[BaseModel]] = [config]
    kinds: Mapping[str, type[BaseModel]] = {}
    is_key = False
    is_place = False
    for part in map(str, location):
        # Behind a section with kinds pydantic names the kind that it validated.
        if part in kinds:
            next_sections, kinds = [kinds[part]], {}
            continue
        path.append(part)
        if is_place and part.isdigit():
            is_place = False
            continue
        sections, kinds = next_sections, {}
        if is_key:  # of a dict of sections
            is_key = False
            continue
        info = next((section.model_fields[part] for section in sections if part in section.model_fields), None)
        next_sections = inner_configs(info.annotation) if info else []
        if info:
            kinds, is_key, is_place = kinds_of(info), is_by_name(info), is_listed(info)
    return _Place(path, sections, info)


def _hint(config: type[BaseModel], place: _Place) -> str:
    """What an unknown name may have meant: a setting of another kind, of a section within, or one with a like name."""
    *above, name = place.path
    parent = _place_of(config, above).info
    kinds = [kind for kind, section in kinds_of(parent).items() if name in section.model_fields] if parent else []
    if kinds:
        return f"{'.'.join(above)} has it where its {KIND} is {' or '.join(kinds)}"
    names: set[str] = set()
    for section in place.sections:
        names.update(section.model_fields)
        for setting in settings(section):
            if setting.name.endswith(f".{name}"):
                return f"did you mean {'.'.join([*above, setting.name])!r}?"
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}?"
    for setting in settings(config):
        if setting.name.endswith(f".<name>.{name}"):
            return f"it is set once for each model, as {setting.name}"
    return f"known names: {', '.join(sorted(names))}"
