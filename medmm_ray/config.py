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
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

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
                sections[name] = info.default.model_dump(exclude_unset=True)
        return _merge(sections, values)


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
    """The fields that decide what a step makes, nested configs included, as plain JSON values."""
    values = {}
    for name, info in type(config).model_fields.items():
        if not is_execution(info):
            value = getattr(config, name)
            values[name] = identity(value) if isinstance(value, Config) else value
    # Through JSON: a tuple and the list that a manifest gives back are then equal.
    plain_values = json.loads(json.dumps(values, sort_keys=True))
    return cast(dict[str, Any], plain_values)


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
    return _read_recipe(Path(path), ())


def _read_recipe(path: Path, above: Sequence[Path]) -> dict[str, Any]:
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
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"recipe {path}: 'extends' is {parent!r}; it names one recipe, by its path beside this one")
    above = [*above, path.resolve()]
    if (path.parent / parent).resolve() in above:
        raise ConfigError(f"recipe {path} extends {parent}, which extends it in turn; a recipe cannot be its own base")
    return _merge(_read_recipe(path.parent / parent, above), raw)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, those of `above` where both have one; sections are merged in turn."""
    merged = dict(below)
    for key, value in above.items():
        are_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if are_sections else value
    return merged


def parse_overrides(
    overrides: Iterable[str],
    section: str | None = None,
    known: Sequence[str] = (),
) -> dict[str, Any]:
    """``a.b=value`` words as a nested dict, values read as YAML.

    A name without a dot that is none of `known` belongs to `section`, the section of the step that is run.
    """
    nested: dict[str, Any] = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"override {word!r} is not of the form name=value, e.g. sample.temperature=0.7")
        if section and "." not in name and name not in known:
            name = f"{section}.{name}"
        try:
            leaf: Any = _parse(value)
        except yaml.YAMLError:
            raise ConfigError(f"override {word!r}: the value is not valid YAML; quote it") from None
        for key in reversed(name.split(".")):  # a.b=1 -> {a: {b: 1}}
            leaf = {key: leaf}
        nested = _merge(nested, leaf)
    return nested


def build(config: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Validate `values` as a `config`; a fault is a `ConfigError` that names `where`, the key and what was expected."""
    try:
        # The JSON rules: strict, but a YAML list may become a tuple.
        return config.model_validate_json(json.dumps(config.completed(values)))
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
    values = read_recipe(recipe) if recipe else {}
    values = _merge(values, parse_overrides(overrides, section, known=tuple(config.model_fields)))
    return build(config, values, str(recipe or "arguments"))


def _explain(config: type[BaseModel], fault: Any) -> str:
    """One fault of pydantic's in the words of a recipe."""
    path = list(map(str, fault["loc"]))
    key = ".".join(path)
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of a whole config: it names its settings
        return ": ".join([*path, str(fault["ctx"]["error"])])
    if fault["type"] == "extra_forbidden":
        names = _names_at(config, path[:-1])
        near = difflib.get_close_matches(
            path[-1],
            names,
            n=1,
        )
        hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(sorted(names))}"
        return f"unknown name {key!r}; {hint}"
    if fault["type"] == "missing":
        return f"{key!r} is required; set it in the recipe or as {key}=..."
    return f"{key!r} is {fault['input']!r}: {fault['msg'].removeprefix('Value error, ')}"


def _names_at(config: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The names that a section may hold; none where `path` leads to no section."""
    for part in path:
        field = config.model_fields.get(part)
        sections = [t for t in _types(field.annotation) if issubclass(t, BaseModel)] if field else []
        if not sections:
            return []
        config = sections[0]
    return list(config.model_fields)


def inner_configs(annotation: Any) -> list[type[Config]]:
    """The sections that a setting of this annotation may hold: one for `JudgeConfig | None`, none for `int`."""
    return [t for t in _types(annotation) if issubclass(t, Config)]


def _types(annotation: Any) -> list[type]:
    """The classes in an annotation: itself, or the members of a union."""
    args = getattr(annotation, "__args__", ())
    return [t for t in (annotation, *args) if isinstance(t, type)]
