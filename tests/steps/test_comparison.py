"""Two runs of the same questions: what is said to be different, and what not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.records import Scores, to_arrow
from medmm_ray.pages.comparison_page import p_text, points, render, summary
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate import EvaluateConfig, Evaluation, evaluate
from medmm_ray.steps.evaluate.comparison import Change, Run, changes, compare
from tests.doubles.synthetic import run

RESAMPLING = Resampling(300, 0)
CONFIG = EvaluateConfig(bootstrap_samples=50)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("images"), num_questions=24, num_samples=8)


@pytest.fixture(scope="module")
def seeing(tables: dict[str, Any]) -> Evaluation:
    return evaluate(CONFIG, **tables, settings={"sample": {"temperature": 0.7, "engine": {"seed": 1}}})


@pytest.fixture(scope="module")
def blind(tables: dict[str, Any]) -> Evaluation:
    """The same run with the image's part of the scores taken away."""
    rows = tables["scores"].to_pylist()
    for row in rows:
        row["image_log_odds"] = [0.0] * len(row["image_log_odds"])
    blind_tables = {**tables, "scores": to_arrow(Scores, rows)}
    return evaluate(CONFIG, **blind_tables, settings={"sample": {"temperature": 1.0, "engine": {"seed": 1}}})


def as_run(name: str, evaluation: Evaluation) -> Run:
    return Run(name, evaluation.report, evaluation.outcomes)


def test_the_outcomes_are_what_the_report_is_the_mean_of(seeing: Evaluation) -> None:
    table, accuracy = seeing.outcomes, seeing.report.accuracy
    assert table.num_rows == seeing.report.counts.questions
    assert np.mean(table["one_sample"]) == pytest.approx(accuracy.one_sample.value, abs=1e-6)
    assert np.mean(table["best_of_n/multimodal/8"]) == pytest.approx(
        accuracy.best_of_n["multimodal"]["8"].value, abs=1e-6
    )
    # Of all samples the best is one, and its answer right or wrong.
    is_right = [
        a == g for a, g in zip(table["answer/multimodal"].to_pylist(), table["answer"].to_pylist(), strict=True)
    ]
    assert is_right == (table["best_of_n/multimodal/8"].to_numpy() == 1).tolist()


def test_what_is_different_is_found_and_what_is_not_is_not(seeing: Evaluation, blind: Evaluation) -> None:
    comparison = compare(as_run("seeing", seeing), as_run("blind", blind), RESAMPLING)
    assert (comparison.n, comparison.questions, comparison.main) == (8, 24, "best_of_n/multimodal")
    main = comparison.figures["best_of_n/multimodal"]
    first, second = (e.report.accuracy.best_of_n["multimodal"]["8"].value for e in (seeing, blind))
    assert main.difference == pytest.approx(second - first, abs=1e-5)
    assert main.adjusted_p is not None
    assert main.adjusted_p < 0.05
    assert main.high is not None
    assert main.high < 0
    for name in ("one_sample", "majority", "oracle", "best_of_n/text_only"):
        assert (comparison.figures[name].difference, comparison.figures[name].p_value) == (0.0, 1.0)
    assert comparison.settings == [Change("sample.temperature", 0.7, 1.0)]
    assert {change.name for change in comparison.steps} >= {"auroc/multimodal", "auroc/shuffled_image"}
    assert set(comparison.groups["difficulty"]) == set(seeing.report.by_difficulty)
    worst = comparison.changed_questions[0]
    assert (worst.first_chance, worst.second_chance, worst.first_answer) == (1.0, 0.0, worst.answer)


def test_only_shared_questions_and_figures_are_compared(seeing: Evaluation) -> None:
    half = seeing.outcomes.slice(4).drop_columns(["sc_rm/text_only/8", "best_of_n/shuffled_image/8"])
    comparison = compare(as_run("a", seeing), Run("b", seeing.report, half), RESAMPLING)
    assert (comparison.questions, comparison.only_in_first, comparison.only_in_second) == (20, 4, 0)
    assert "sc_rm/text_only" not in comparison.figures
    assert "best_of_n/multimodal" in comparison.figures


def test_runs_that_share_nothing_are_refused(seeing: Evaluation) -> None:
    other = seeing.outcomes.set_column(0, "question_id", pa.array([f"x{i}" for i in range(24)]))
    with pytest.raises(ValueError, match=r"a \(24 questions\) and b \(24\) have no question in common"):
        compare(as_run("a", seeing), Run("b", seeing.report, other), RESAMPLING)
    with pytest.raises(ValueError, match=r"a has figures at N = \[1, 2, 4, 8\] and b at \[16\]"):
        compare(as_run("a", seeing), Run("b", replace(seeing.report, ns=[16]), seeing.outcomes), RESAMPLING)


def test_settings_that_differ_by_their_whole_names() -> None:
    first = {"a": {"x": 1, "y": {"z": [1]}}, "models": {"policy": "p"}}
    second = {"a": {"x": 1, "y": {"z": [2]}}, "b": 3}
    assert changes(first, second) == [
        Change("a.y.z", [1], [2]),
        Change("models", {"policy": "p"}, None),
        Change("b", None, 3),
    ]


def test_the_page_and_the_terminal(seeing: Evaluation, blind: Evaluation) -> None:
    from rich.console import Console

    comparison = compare(as_run("<seeing>", seeing), as_run("blind", blind), RESAMPLING)
    html = render(comparison)
    assert "&lt;seeing&gt;" in html
    assert "more than chance makes" in html
    assert "sample.temperature" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    with Console(width=160).capture() as capture:
        Console(width=160).print(summary(comparison))
    assert [points(x) for x in (0.0512, -0.5, None)] == ["+5.1", "−50.0", "–"]
    assert [p_text(x) for x in (0.0004, 0.0214, 1.0, None)] == ["< .001", ".021", "1", "–"]
    del capture


def test_the_command_compares_two_folders(seeing: Evaluation, blind: Evaluation, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from jobs import compare as job
    from medmm_ray.data.json_documents import to_json

    for name, evaluation in (("seeing", seeing), ("blind", blind)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(to_json(evaluation.report))
        pq.write_table(evaluation.outcomes, tmp_path / name / "outcomes.parquet")
    words = [str(tmp_path / "seeing"), str(tmp_path / "blind"), f"to={tmp_path / 'out'}", "bootstrap_samples=50"]
    assert job.main(words) == 0
    assert "best_of_n/multimodal" in (tmp_path / "out" / "comparison.json").read_text()
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert job.main([str(tmp_path / "seeing")]) == 2
    with pytest.raises(ConfigError, match=r"nowhere/report.json does not exist; evaluate the run first"):
        job.read_run(str(tmp_path / "nowhere"), "nowhere")
    assert job.short_names("runs/a/x", "runs/b/x/") == ("a/x", "b/x")
