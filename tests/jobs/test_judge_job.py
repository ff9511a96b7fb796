"""The judge as a Ray Data job against a server that counts (jobs/benches/judge_server.py): budget, kill, counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.benches import judge as bench
from jobs.entry import root_cause
from jobs.graph import BY_NAME, MAKER
from jobs.step import Job, Run, load_recipe, run_step
from medmm_ray.config import build
from medmm_ray.data.records import Image, Labels, Question, Solutions, from_dict
from medmm_ray.data.tables import Table
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, judge
from tests.pages.review_page.phantom_run import RECIPE, make_run

pytestmark = pytest.mark.engine
SMALL = bench.BenchConfig(questions=8, solutions=6, steps=3, in_flight=4, latency_s=0.1, per_call=())


@pytest.fixture
def address() -> Iterator[str]:
    with bench.server(SMALL) as running:
        yield running


def label(path: Path, address: str, **more: Any) -> list[dict[str, Any]]:
    how = {
        "endpoint": f"{address}/v1",
        "input_price": 1.0,
        "output_price": 1.0,
        "in_flight": 4,
    }
    how |= {"key_variable": "HOME", "max_attempts": 8, "pause_s": 0.05}  # set when the session's workers started
    apis = Apis(str(path / "api"), {"bench": build(ApiConfig, {**how, **more}, "test")})
    config = JudgeConfig(engine=JudgeApi(kind="openai", model="bench"))
    records = (("questions", Question), ("images", Image))
    tables = {name: Table(str(path / name), record).to_arrow() for name, record in records}
    source = Table(str(path / "solutions"), Solutions).dataset(rows_per_block=4)
    made = judge(source, config, **tables, model="bench", apis=apis)
    return [label for row in made.take_all() for label in row["labels"]]


def test_the_budget_ends_the_job_with_a_sentence_and_a_larger_one_goes_on(
    ray_session: None, tmp_path: Path, address: str
) -> None:
    bench.write_tables(tmp_path, SMALL)
    with pytest.raises(Exception) as error:  # noqa: PT011 - Ray wraps it
        label(tmp_path, address, max_cost_usd=0.05)
    words = root_cause(error.value)
    assert words.startswith("the next call can cost $0.0")
    assert "would exceed max_cost_usd=0.05: $0.0" in words
    assert words.endswith("What has arrived is kept; raise max_cost_usd and run again")
    first = bench.server_report(address)
    assert 0 < first["delivered"] < 48
    bill = (first["tokens"]["prompt"] + first["tokens"]["completion"]) / 1e6
    assert bill <= 0.05
    labels = label(tmp_path, address, max_cost_usd=5.0)
    found = bench.server_report(address)
    assert [row["error"] for row in labels] == [None] * 48
    assert (found["twice"], found["inside"]) == (0, 0)
    paid = close_ledger(f"{tmp_path}/api/bench")
    bill = (found["tokens"]["prompt"] + found["tokens"]["completion"]) / 1e6
    assert paid.spent + paid.possibly_paid >= bill - 1e-9


def test_an_expired_key_ends_the_job_with_a_sentence(ray_session: None, tmp_path: Path, address: str) -> None:
    bench.write_tables(tmp_path, SMALL)
    with pytest.raises(Exception) as error:  # noqa: PT011 - Ray wraps it
        label(tmp_path, f"{address}/nowhere")
    assert root_cause(error.value).startswith("bench answered 404: ")
    assert "check HOME, the model's name and its address" in root_cause(error.value)


@pytest.mark.chaos
def test_a_killed_job_loses_no_row_and_pays_nothing_twice_but_what_was_in_flight(tmp_path: Path, address: str) -> None:
    bench.write_tables(tmp_path, SMALL)
    measured = {row.name: row for row in bench._killed(tmp_path, address, SMALL, Console())}
    assert [row.name for row in measured.values() if row.met is False] == []
    assert measured["killed -9: rows labelled or named"].ours == 48
    assert len(Table(str(tmp_path / "killed"), Labels).to_arrow()) == 48


def test_two_judges_label_every_solution_side_by_side(ray_session: None, tmp_path: Path) -> None:
    made = make_run(tmp_path / "made")
    run = Run(
        load_recipe([RECIPE, f"run={tmp_path / 'run'}", "second_judge.seed=1", "second_judge.engine.error_rate=0.4"])
    )
    for name in ("questions", "images", "evidence", "solutions"):
        table = made.table(name)
        rows = [from_dict(table.record, row) for row in table.to_arrow().to_pylist()]
        Job(run, MAKER[name]).make_rows(name, rows, "question_id" if name != "images" else "image_id")
    run_step(run, BY_NAME["judge"])
    labels = run.table("judge_labels").to_arrow().to_pylist()
    solutions = [s["solution_id"] for row in run.table("solutions").to_arrow().to_pylist() for s in row["solutions"]]
    of_solution: dict[str, set[str]] = {}
    for row in labels:
        of_solution.setdefault(row["solution_id"], set()).add(row["annotator"])
    assert sorted(of_solution) == sorted(solutions)
    assert len(labels) == 2 * len(solutions)
    assert {len(annotators) for annotators in of_solution.values()} == {2}
    assert run.table("judge_labels").manifest().config["second_judge"]["error_rate"] == 0.4
