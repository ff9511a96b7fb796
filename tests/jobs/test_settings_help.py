"""What ``--help`` and ``--help-all`` print of settings."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from jobs.graph import BY_NAME
from jobs.recipe import Recipe
from jobs.settings_help import all_settings, overview
from medmm_ray.config import Config, execution


class Generation(Config):
    """A section of the recipe below."""

    temperature: float = 0.7
    """Softmax temperature."""
    kind: Literal["vllm", "openai"] | None = None
    """Who answers."""
    retries: int = execution(3)
    """How often a call is made again."""
    num_gpus: int = execution(0)
    """GPUs an engine."""


class Whole(Config):
    """A recipe."""

    run: str
    """Output folder."""
    sample: Generation = Generation()
    """How solutions are sampled."""
    judge: Generation = Generation()
    """Who judges."""


def lines(text: str) -> dict[str, list[str]]:
    """The words of each line that describes a setting, by its name."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_all_settings_have_their_type_default_and_description() -> None:
    text = lines(all_settings(Whole))
    assert text["sample.temperature"] == ["number", "0.7", "Softmax", "temperature."]
    assert text["sample.kind"] == ["vllm", "|", "openai", "|", "null", "null", "Who", "answers."]
    assert text["run"] == ["text", "(required)", "Output", "folder."]
    assert "sample.retries" in text
    assert not [name for name in lines(all_settings(Whole, "judge")) if name.startswith("sample.")]


def test_the_overview_has_what_decides_the_result_and_what_most_runs_set() -> None:
    section = lines(overview(Whole, "sample"))
    assert section["sample.temperature"] == ["0.7", "Softmax", "temperature."]
    assert "sample.num_gpus" in section
    assert "sample.retries" not in section
    assert section["3"] == ["of", "4", "settings;", "--help-all", "shows", "every", "one,", "with", "its", "type."]
    assert {"run", "sample.*", "judge.*"} < set(lines(overview(Whole)))


class Local(Config):
    kind: Literal["local"] = "local"
    """local: a model in the process."""
    num_gpus: int = execution(0)
    """GPUs per engine."""
    retries: int = execution(3)
    """How often a call is made again."""


class Remote(Config):
    kind: Literal["one", "two"]
    """one, two: a model behind an API."""
    model: str
    """Name of the model."""
    retries: int = execution(3)
    """How often a call is made again."""


class Judging(Config):
    engine: Annotated[Local | Remote, Field(discriminator="kind")] = Local(num_gpus=2)
    """Who judges."""
    splits: int = 1
    """Splits that are judged."""


class WithEngine(Config):
    judge: Judging = Judging()
    """Who judges."""


def test_an_engine_shows_the_settings_of_all_kinds_each_with_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["local:", "a", "model", "in", "the", "process;", "one,", "two:", "a", "model", "behind", "an", "API."]
    whole = lines(all_settings(WithEngine))
    assert whole["judge.engine.kind"][:6] == ["local", "|", "one", "|", "two", '"local"']
    assert whole["judge.engine.model"] == ["text", "(required)", "one,", "two:", "Name", "of", "the", "model."]
    assert whole["judge.engine.retries"] == ["integer", "3", "How", "often", "a", "call", "is", "made", "again."]
    section = lines(overview(WithEngine, "judge"))
    assert section["judge.engine.kind"] == ['"local"', *words]
    assert section["judge.engine.num_gpus"] == ["2", "local:", "GPUs", "per", "engine."]
    assert list(section) == [
        "judge.engine.kind", "judge.engine.model", "judge.engine.num_gpus", "judge.splits", "4"
    ]  # fmt: skip
    assert section["4"][:3] == ["of", "5", "settings;"]


@pytest.mark.parametrize("name", [*BY_NAME, "serve", "beam_search", None])
def test_the_overview_is_one_screen(name: str | None) -> None:
    text = overview(Recipe, name)
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 120
