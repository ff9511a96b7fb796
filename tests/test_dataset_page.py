"""The dataset's page: complete, escaped, self-contained; and the terminal's summary."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from medmm_ray import charts, dataset_page
from medmm_ray.charts import Whisker
from tests.test_audit import report
from tests.test_report import Balanced


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return report()


def shown(found: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=110).print(dataset_page.summary(found))
    return stream.getvalue()


def test_the_page_is_well_formed_and_loads_nothing(made: dict[str, Any]) -> None:
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


def test_a_dataset_without_labels_or_solutions_has_a_page() -> None:
    bare = report(labels={}, solutions=[], review_queue=None, missing=["solutions", "judge_labels"])
    page = dataset_page.render(bare)
    for words in ("No labels yet.", "No solutions yet.", "No two sources", "Not there yet: solutions, judge labels"):
        assert words in page
    assert "not there yet: solutions, judge_labels" in shown(bare)


def test_the_page_is_escaped(made: dict[str, Any]) -> None:
    hostile = {**made, "title": "<script>alert(1)</script>", "missing": ["<b>"]}
    hostile["coverage"] = {
        **made["coverage"],
        "modalities": {"<img src=x>": made["coverage"]["modalities"]["radiology"]},
    }
    html = dataset_page.render(hostile)
    assert "<script>" not in html
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


def test_the_lead_counts_the_gates(made: dict[str, Any]) -> None:
    lead = dataset_page.lead(made)
    assert lead.startswith(
        "The dataset meets 3 of 8 quality gates. Not met: judge agrees with the expert; right steps;"
    )
    assert "No figure yet" not in lead


def test_the_summary_has_a_line_a_gate_and_says_what_to_do(made: dict[str, Any]) -> None:
    lines = shown(made).splitlines()
    assert lines[0].startswith("3 questions, 3 solutions, 9 steps")
    assert [line[0] for line in lines[2:10]] == ["✗", "✗", "✗", "✓", "✗", "✗", "✓", "✓"]
    assert any(line.startswith("Modalities present: Add a source") for line in lines)


def test_intervals_in_words() -> None:
    assert dataset_page.interval({"low": 0.1, "high": 0.25}) == "10.0–25.0"
    assert dataset_page.interval({"low": -0.1, "high": 0.25}, share=False) == "−0.10 to 0.25"
    assert dataset_page.interval({"low": -0.001, "high": 0.004}, share=False) == "0.00–0.00"
    assert dataset_page.interval({"low": None, "high": None}) == dataset_page.interval(None) == ""


def test_whiskers_stay_on_their_scale() -> None:
    inside = charts.gauge(Whisker("", 0.5, 0.4, 0.6, target=(0.7, 0.8)), (0, 1))
    assert 'cx="110.0"' in inside
    assert 'x="151.6" width="20.8"' in inside
    outside = charts.gauge(Whisker("", 40.0, 40.0, 40.0, target=(8, 12)), (0, 20))
    assert 'cx="214.0"' in outside
    assert "M" not in outside.replace("viewBox", "")  # no interval of width 0
    assert 'x="6.0"' in charts.gauge(Whisker("", 5.0, target=(None, 10)), (0, 20))


def test_a_forest_writes_values_and_leaves_out_what_is_not_known() -> None:
    rows: list[Whisker | str] = [
        "Heading",
        Whisker("a", 0.25, 0.2, 0.3, target=(0.2, None)),
        Whisker("b", None),
        Whisker("<c>", -0.5),
    ]
    drawn = charts.forest(rows, (-1.0, 1.0), False, "x", "label")
    assert drawn.count("<circle") == 2
    assert "0.250" in drawn
    assert "−0.500" in drawn
    assert "&lt;c&gt;" in drawn
    assert drawn.count(charts.TARGET) == 1
    assert "25.0 %" in charts.forest(rows, (0.0, 1.0), True, "x", "label")


def test_bars_are_as_high_as_their_shares() -> None:
    drawn = charts.bars([("1", 0.25, charts.BLUE), ("2", 0.5, charts.ORANGE)], (0, 1), "x", "y", "label")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill="#(?:0072b2|d55e00)"', drawn)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert charts.bars([], None, "x", "y", "label").count("<rect") == 0
