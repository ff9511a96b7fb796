"""The simulation of large runs: its arithmetic, and that the page in docs/ is what it writes."""

import pytest

from jobs import simulate
from jobs.step import load_recipe
from medmm_ray.estimate import Estimate
from tests.paths import ROOT

MEDMM = "jobs/recipes/medmm.yaml"


@pytest.fixture(scope="module")
def results() -> list[Estimate]:
    recipe = load_recipe([MEDMM])
    return [simulate.result_of(recipe, questions) for questions in (10_000, 1_000_000)]


def test_work_grows_with_the_questions_and_no_faster(results: list[Estimate]) -> None:
    small, large = results
    assert (small.sizes.questions, large.sizes.questions) == (10_000, 1_000_000)
    assert small.line("judge").calls == 64 * 10_000
    # Training questions alone grow: 9,000 of 10,000, 999,000 of a million.
    assert large.line("states").stored / small.line("states").stored == pytest.approx(111)
    assert 100 < large.gpu_hours / small.gpu_hours < 111


def test_hours_shrink_with_the_cluster_down_to_the_starts_of_the_steps(results: list[Estimate]) -> None:
    small, large = results
    on_gpus = [line for line in small.lines if line.gpu_hours]
    assert simulate.wall_hours(small, 10**9) == pytest.approx(0.1 * len(on_gpus), rel=0.01)
    four, sixty_four = (simulate.wall_hours(large, number) for number in (4, 64))
    assert four == pytest.approx(large.gpu_hours / (4 * 0.9), rel=0.01)
    assert 15 < four / sixty_four <= 16
    assert simulate.api_hours(small, 64) == pytest.approx(640_000 * 4 / 64 / 3600)


def test_the_first_limit_is_what_is_used_up_first(results: list[Estimate]) -> None:
    limits = simulate.limits(results[0])
    assert [limit.questions for limit in limits] == sorted(limit.questions for limit in limits)
    assert limits[0].what == "text states on shared storage"
    # 64 solutions of 8 steps, two vectors of 4,096 bfloat16 each: 8.4 MB a training question.
    assert limits[0].questions == pytest.approx(100e12 / (0.9 * 64 * 8 * 2 * 4096 * 2))


def test_the_page_in_docs_is_what_the_command_in_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/scale.md").read_text()
    command = page.split("`")[1]
    assert command == f"python -m jobs.simulate {MEDMM} --to docs/scale.md"
    assert simulate.document(load_recipe([MEDMM]), command) == page
    assert simulate.main([MEDMM]) == 0
    assert "| 1,000,000,000 |" in capsys.readouterr().out


def test_a_recipe_without_an_api_as_its_judge_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["jobs/recipes/tiny.yaml"]) == 2
    assert "judge.engine.kind is 'phantom'" in capsys.readouterr().err
