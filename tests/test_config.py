from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from medmm_ray.config import (
    Config,
    ConfigError,
    build,
    digest,
    execution,
    identity,
    load,
    parse_overrides,
    read_recipe,
)


class Sampling(Config):
    temperature: float = 0.7
    """Softmax temperature."""
    batch_size: int = execution(8)
    """Questions a batch."""
    steps: tuple[int, ...] = (3, 9)
    """Steps kept, lowest and highest."""


class Recipe(Config):
    run: str
    """Output folder."""
    sample: Sampling = Sampling()


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sampling().temperature = 1.0  # type: ignore[misc]


def test_identity_leaves_out_how_a_step_runs() -> None:
    assert identity(Sampling(batch_size=2)) == {"temperature": 0.7, "steps": [3, 9]}
    assert identity(Sampling(temperature=0.2)) != identity(Sampling())


def test_digest_depends_on_values_not_on_key_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) == "44c7deead2ed8313"
    assert digest("a", "b") != digest("ab")


def test_recipe_extends_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("run: runs/base\nsample: {temperature: 1, batch_size: 4}\n")
    (tmp_path / "small.yaml").write_text("extends: base.yaml\nrun: runs/small\nsample: {temperature: 1e-4}\n")
    recipe = load(Recipe, tmp_path / "small.yaml", ["sample.batch_size=2", "steps=[2, 5]"], section="sample")
    assert recipe == Recipe(run="runs/small", sample=Sampling(temperature=1e-4, batch_size=2, steps=(2, 5)))


def test_a_section_states_only_how_it_differs_from_its_own_default() -> None:
    class Bench(Config):
        sample: Sampling = Sampling(temperature=0.2, steps=(1, 4))
        other: Sampling | None = None

    made = load(Bench, None, ["sample.batch_size=2", "other.batch_size=3"])
    assert made.sample == Sampling(temperature=0.2, steps=(1, 4), batch_size=2)
    assert made.other == Sampling(batch_size=3)
    with pytest.raises(ConfigError, match="'sample' is 5"):
        load(Bench, None, ["sample=5"])


def test_a_known_top_level_name_is_not_taken_for_the_sections() -> None:
    assert parse_overrides(["run=x", "k=1"], Recipe, "sample") == {"run": "x", "sample": {"k": 1}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "x", "sample": {"temprature": 1}}, "unknown name 'sample.temprature'; did you mean 'temperature'?"),
        ({"run": "x", "smaple": {}}, "unknown name 'smaple'; did you mean 'sample'?"),
        ({"run": "x", "sample": {"zzz": 1}}, "known names: batch_size, steps, temperature"),
        (
            {"run": "x", "sample": {"temperature": "hot"}},
            "'sample.temperature' is 'hot': Input should be a valid number",
        ),
        ({"run": "x", "sample": {"batch_size": "4"}}, "'sample.batch_size' is '4': Input should be a valid integer"),
        ({}, "'run' is required; set it in the recipe or as run=..."),
    ],
)
def test_faults_name_the_key_and_what_was_expected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, values, "r.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")


@pytest.mark.parametrize("word", [".nan", ".inf", "-.inf"])
def test_a_number_is_finite(word: str) -> None:
    with pytest.raises(ConfigError, match=r"'sample.temperature' is (nan|-?inf): Input should be a finite number"):
        load(Recipe, None, ["run=x", f"sample.temperature={word}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("just text", "must hold 'section: {name: value}'"),
        (None, "does not exist"),
        ("[a]: 1", "not valid YAML"),
        ("extends: r.yaml", "r.yaml extends r.yaml, which extends it in turn"),
        ("extends: [a, b]", r"'extends' is \['a', 'b'\]; it names one recipe"),
        ("extends: 5", "'extends' is 5; it names one recipe"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(Recipe, path)


def test_recipes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory; name a YAML file"):
        load(Recipe, tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"r\.yaml is no text"):
        load(Recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        ("judge: {max_cost_usd: 5}\nrun: x\njudge: {model: m}\n", "judge", 3),
        ("judge:\n  model: a\n  model: a\n", "model", 3),
        ("judge: [{a: 1}, {b: 1, b: 2}]\n", "b", 1),
    ],
)
def test_a_name_that_stands_twice_is_refused_with_its_line(tmp_path: Path, content: str, name: str, line: int) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"'{name}' stands there twice; write it once(.|\n)* line {line},"):
        read_recipe(tmp_path / "r.yaml")


def test_what_a_merge_brings_may_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, x: 4}\n")
    assert read_recipe(tmp_path / "r.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 4, "y": 2}}


@pytest.mark.parametrize("word", ["--lr=3", "lr", "=3", "a=[1"])
def test_malformed_overrides(word: str) -> None:
    with pytest.raises(ConfigError):
        load(Recipe, None, ["run=x", word])


class Local(Config):
    kind: Literal["local"] = "local"
    dtype: str = "bfloat16"
    num_gpus: float = execution(0.0)


class Remote(Config):
    kind: Literal["one", "two"]
    model: str
    form: str = "schema"


class Asking(Config):
    engine: Annotated[Local | Remote, Field(discriminator="kind")] = Local()
    temperature: float = 0.7


def test_identity_has_the_same_names_whatever_the_engine() -> None:
    """An engine's fields stand beside its section's, those of other kinds at their defaults."""
    local = identity(Asking(engine=Local(dtype="float32", num_gpus=1)))
    assert local == {"backend": "local", "dtype": "float32", "form": "schema", "model": None, "temperature": 0.7}
    remote = identity(Asking(engine=Remote(kind="two", model="m", form="text")))
    assert remote == {"backend": "two", "dtype": "bfloat16", "form": "text", "model": "m", "temperature": 0.7}


def test_a_section_of_another_kind_replaces_the_one_below_and_one_of_the_same_is_merged(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("engine: {dtype: float32, num_gpus: 2}\ntemperature: 0.1\n")
    base = tmp_path / "base.yaml"
    assert load(Asking, base, ["engine.num_gpus=1"]).engine == Local(dtype="float32", num_gpus=1)
    other = load(Asking, base, ["engine.model=m", "engine.kind=two"])
    assert other == Asking(engine=Remote(kind="two", model="m"), temperature=0.1)
