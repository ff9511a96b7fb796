"""The dataset's page: complete, escaped, self-contained; and the terminal's summary."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from medmm_ray.pages import charts, dataset_page, svg
from medmm_ray.pages.charts import Bar
from medmm_ray.pages.forest import Whisker, forest, gauge
from medmm_ray.steps.audit import AuditReport
from tests.pages.test_report import Balanced
from tests.steps.test_audit import audited, manifest


@pytest.fixture(scope="module")
def made() -> AuditReport:
    return audited()


def shown(found: AuditReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=110).print(dataset_page.summary(found))
    return stream.getvalue()


def test_the_page_is_well_formed_and_loads_nothing(made: AuditReport) -> None:
    page = dataset_page.render(made)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not [value for _, name, value in parser.attributes if name in ("src", "href", "srcset")]
    assert not re.search(r"@import|url\(|<script|<link", page)
    assert len(page) < 200_000
    assert page.count('<svg class="gauge"') == 6
    assert page.count('class="state failed"') == 5
    assert "<b>62.5 %</b>" in page
    assert "Judge – Expert *" in page


def words_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]).split())


def test_what_sampling_monte_carlo_and_readers_took_is_shown() -> None:
    figures = {
        "solutions": {"cacheable_tokens": 800.0, "cached_tokens": 780.0},
        "monte_carlo_labels": {
            "rollouts": 4000.0, "prefixes_continued": 500.0, "rollout_tokens": 90000.0, "failed_rollouts": 30.0,
            "steps_labelled": 700.0, "steps_known_free": 200.0, "prompt_tokens": 1000.0, "cached_tokens": 900.0,
        },
        "expert_labels": {
            "queue": 100.0, "read": 90.0, "read_twice": 20.0, "adjudicated": 3.0, "unsure": 2.0, "left_out": 1.0,
            "readers": 2.0, "verdicts": 113.0, "minutes": 56.5, "kappa_readers": 0.75, "kappa_readers_low": 0.5,
            "kappa_readers_high": 0.9, "kappa_readers_steps": 19.0,
        },
    }  # fmt: skip
    page = words_of(dataset_page.render(audited(manifests={n: manifest(n, figures=f) for n, f in figures.items()})))
    for words in (
        "Prefix cache 97.5 % of the prompt tokens that a question’s further samples share were found Questions",
        "Monte Carlo Steps 700 labelled, 200 of them without a continuation",
        "4 000 of 500 prefixes, 90 000 tokens written Failed 30 were cut off",
        "Prefix cache 90.0 % of the prompt tokens found",
        "Readers Queue 90 of 100 steps read by 2 readers, 20 by two; 3 adjudicated",
        "κ 0.750 0.50–0.90 , over 19 steps",
        "Time 0.50 minutes a verdict, 56.5 in all Without a verdict 2 unsure; 1 on another text",
        "Readers $56.50",
    ):
        assert words in page, words
    figures["expert_labels"] = {k: v for k, v in figures["expert_labels"].items() if not k.startswith("kappa")}
    page = words_of(dataset_page.render(audited(manifests={n: manifest(n, figures=f) for n, f in figures.items()})))
    assert "– (no step that two readers call right or wrong, or all alike)" in page
    page = words_of(dataset_page.render(audited()))
    assert not [words for words in ("Prefix cache", "Queue", "Continuations") if words in page]
    assert "No paid call is booked" not in page  # the rows' own costs
    assert "Time on own GPUs" in page


def test_a_dataset_without_labels_or_solutions_has_a_page() -> None:
    bare = audited(labels={}, solutions=[], review_queue=None, missing=["solutions", "judge_labels"])
    page = dataset_page.render(bare)
    for words in ("No labels yet.", "No solutions yet.", "No two sources", "Not there yet: solutions, judge labels"):
        assert words in page
    assert "not there yet: solutions, judge_labels" in shown(bare)


def test_the_page_is_escaped(made: AuditReport) -> None:
    modalities = {"<img src=x>": made.coverage.modalities["radiology"]}
    coverage = replace(made.coverage, modalities=modalities)
    hostile = replace(made, title="<script>alert(1)</script>", missing=["<b>"], coverage=coverage)
    html = dataset_page.render(hostile)
    assert "<script>" not in html
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


def test_the_lead_counts_the_gates(made: AuditReport) -> None:
    lead = dataset_page.lead(made)
    assert lead.startswith(
        "The dataset meets 3 of 8 quality gates. Not met: judge agrees with the expert; right steps;"
    )
    assert "No figure yet" not in lead


def test_the_summary_has_a_line_a_gate_and_says_what_to_do(made: AuditReport) -> None:
    lines = shown(made).splitlines()
    assert lines[0].startswith("3 questions, 3 solutions, 9 steps")
    assert [line[0] for line in lines[2:10]] == ["✗", "✗", "✗", "✓", "✗", "✗", "✓", "✓"]
    assert any(line.startswith("Modalities present: Add a source") for line in lines)


def test_intervals_in_words() -> None:
    assert dataset_page.interval(0.1, 0.25) == "10.0–25.0"
    assert dataset_page.interval(-0.1, 0.25, share=False) == "−0.10 to 0.25"
    assert dataset_page.interval(-0.001, 0.004, share=False) == "0.00–0.00"
    assert dataset_page.interval(None, None) == ""


def test_whiskers_stay_on_their_scale() -> None:
    inside = gauge(Whisker("", 0.5, 0.4, 0.6, target=(0.7, 0.8)), (0, 1))
    assert 'cx="110.0"' in inside
    assert 'x="151.6" width="20.8"' in inside
    outside = gauge(Whisker("", 40.0, 40.0, 40.0, target=(8, 12)), (0, 20))
    assert 'cx="214.0"' in outside
    assert "M" not in outside.replace("viewBox", "")  # no interval of width 0
    assert 'x="6.0"' in gauge(Whisker("", 5.0, target=(None, 10)), (0, 20))


def test_a_forest_writes_values_and_leaves_out_what_is_not_known() -> None:
    rows: list[Whisker | str] = [
        "Heading",
        Whisker("a", 0.25, 0.2, 0.3, target=(0.2, None)),
        Whisker("b", None),
        Whisker("<c>", -0.5),
    ]
    drawn = forest(rows, (-1.0, 1.0), False, "x", "label")
    assert drawn.count("<circle") == 2
    assert "0.250" in drawn
    assert "−0.500" in drawn
    assert "&lt;c&gt;" in drawn
    assert drawn.count(svg.TARGET) == 1
    assert "25.0 %" in forest(rows, (0.0, 1.0), True, "x", "label")


def test_bars_are_as_high_as_their_shares() -> None:
    drawn = charts.bars([Bar("1", 0.25, svg.BLUE), Bar("2", 0.5, svg.ORANGE)], (0, 1), "x", "y", "label")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill="#(?:0072b2|d55e00)"', drawn)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert charts.bars([], None, "x", "y", "label").count("<rect") == 0
