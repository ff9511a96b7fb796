"""Benchmarks beside published figures: rows, columns, means, and what is marked as a paper's."""

import pytest

from medmm_ray.pages.benchmark_page import markdown, render, summary
from medmm_ray.steps.evaluate import EvaluateConfig, evaluate
from medmm_ray.steps.evaluate.benchmark_table import MEAN, benchmark_table, table_of
from medmm_ray.steps.evaluate.published import TABLES
from tests.steps.test_evaluate import small


def test_the_published_tables_are_whole_and_give_their_own_means() -> None:
    for name, table in TABLES.items():
        for system in table.systems:
            assert set(system.figures) <= set(table.data_sets), (name, system.name)
            assert all(0 < value < 1 for value in system.figures.values()), (name, system.name)
    means = [sum(system.figures.values()) / 7 for system in TABLES["med_prm"].systems]
    assert [round(100 * mean, 2) for mean in means] == [64.76, 70.03, 72.39, 72.67]
    means = [sum(system.figures.values()) / 5 for system in TABLES["mirage"].systems]
    assert [round(100 * mean, 2) for mean in means] == [60.69, 71.56]  # the leaderboard says 71.57


def test_benchmarks_by_name_have_the_papers_that_report_them() -> None:
    table = table_of("medqa,slake")
    assert table.data_sets == ("medqa", "slake")
    by_name = {system.name: dict(system.figures) for system in table.systems}
    assert by_name["Med-PRM, SC+RM (Med-PRM, Llama-3.1-8B-Instruct)"] == {"medqa": pytest.approx(0.7824)}
    assert by_name["target of the plan (Medical visual questions)"] == {"slake": 0.785}
    assert table_of("prmbench").metric == "prm_score"
    assert table_of("med_prm") is TABLES["med_prm"]


def test_a_run_its_baseline_and_the_papers_side_by_side() -> None:
    """One question of VQA-RAD and two of SLAKE: best-of-2 by the text .0, by the image 1 and 0."""
    report = evaluate(EvaluateConfig(ns=(1, 2)), **small()).report
    table = benchmark_table(table_of("vqa_rad,slake"), {"ours": report, "baseline": report}, {"slake": 1061})
    assert list(table.rows) == ["vqa_rad", "slake", MEAN]
    assert table.questions == {"vqa_rad": 1, "slake": 2}
    assert [table.num_questions(row) for row in table.rows] == ["1", "2 of 1,061", ""]
    columns = {(column.owner, column.name): column for column in table.columns}
    ours = columns["ours", "best of 2, multimodal"]
    assert (ours.figures["vqa_rad"].value, ours.figures["vqa_rad"].low) == (1.0, None)
    assert (ours.figures["slake"].value, ours.figures[MEAN].value) == (0.0, 0.5)
    assert columns["baseline", "best of 2, multimodal"].figures == ours.figures
    plan = columns["published", "target of the plan (Medical visual questions)"]
    assert plan.is_published
    assert plan.figures[MEAN].value == pytest.approx((0.82 + 0.785) / 2)


def test_a_mean_is_over_all_benchmarks_or_there_is_none() -> None:
    report = evaluate(EvaluateConfig(ns=(1, 2)), **small()).report
    table = benchmark_table(table_of("vqa_rad,path_vqa"), {"ours": report}, {})
    ours = [column for column in table.columns if column.owner == "ours"]
    assert all(MEAN not in column.figures for column in ours)
    assert list(table.rows) == ["vqa_rad", "path_vqa", MEAN]  # the plan has a target for it


def test_step_benchmarks_have_their_kinds_of_errors() -> None:
    """Four steps of VisualProcessBench's figure, of which the kinds are rows of their own."""
    tables = small()
    rows = tables["questions"].to_pylist()
    rows[0] |= {"dataset": "prmbench", "published_type": "circular"}
    questions = type(tables["questions"]).from_pylist(rows, schema=tables["questions"].schema)
    report = evaluate(EvaluateConfig(), **{**tables, "questions": questions}).report
    table = benchmark_table(table_of("prmbench"), {"ours": report}, {})
    assert list(table.rows) == ["prmbench", "prmbench: circular"]
    columns = {column.name: column.figures for column in table.columns}
    assert columns["multimodal"]["prmbench: circular"].value == report.step["multimodal"].macro_f1 == 1.0
    assert table.questions == {"prmbench": 2, "prmbench: circular": 2}


def test_published_figures_are_marked_on_the_page_in_markdown_and_on_the_terminal() -> None:
    from rich.console import Console

    report = evaluate(EvaluateConfig(ns=(1, 2)), **small()).report
    table = benchmark_table(table_of("medical_vqa"), {"<ours>": report}, {"vqa_rad": 451})
    html = render(table)
    assert "<i>82.0\u00a0%</i>" in html
    assert "&lt;ours&gt;" in html
    text = markdown(table)
    assert "*target of the plan, published*" in text.splitlines()[0]
    assert text.splitlines()[2].startswith("| vqa_rad | 1 of 451 | 50.0\u00a0% |")
    assert text.splitlines()[2].endswith("| *82.0\u00a0%* |")
    console = Console(width=150)
    with console.capture() as capture:
        console.print(summary(table))
    assert "target of the plan (published)" in capture.get()
