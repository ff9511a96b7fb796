"""The page: complete, escaped, self-contained; its figures; the terminal's summary."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image as Picture
from rich.console import Console

from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.records import Labels, Scores, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.pages import charts, report, svg
from medmm_ray.pages.charts import CalibrationCurve
from medmm_ray.stats.metrics import CalibrationBin
from medmm_ray.steps.evaluate import EvaluateConfig, EvaluationReport, StepEntry, environment, evaluate
from tests.doubles.synthetic import run

VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Collects tags and fails where one is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("images"), num_questions=24, num_samples=8)


@pytest.fixture(scope="module")
def made(tables: dict[str, Any]) -> EvaluationReport:
    steps = [
        StepEntry("train_policy", rows=0, seconds=95.0),
        StepEntry("sample", rows=1050, seconds=151.2, cost=1.25, errors={"engine": 1}),
    ]
    evaluated = evaluate(EvaluateConfig(), **tables, steps=steps, environment=environment())
    # As the pipeline reads it from report.json.
    return from_json(EvaluationReport, to_json(evaluated.report))


def open_picture(uri: str) -> Picture.Image:
    return Picture.open(uri)


@pytest.fixture(scope="module")
def page(made: EvaluationReport) -> str:
    return report.render(made, open_picture)


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    sources = [value for _, name, value in parser.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 8  # six examples, two disagreements
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert len(page) < 1_000_000
    assert not re.search(r"@import|url\(|<script|<link", page)


def test_the_page_is_escaped(page: str, made: EvaluationReport) -> None:
    assert "fully expanded (no &#34;&lt;b&gt;&#34; sign)" in page
    example = replace(made.examples[0], question="<img src=x onerror=1>", options=["<b>"], images=[])
    environment = {"platform": "<i>x</i>"}
    hostile = replace(made, title="<script>alert(1)</script>", environment=environment, examples=[example])
    html = report.render(hostile, open_picture)
    assert "<script>" not in html
    assert "<img src=x" not in html
    assert "<i>x</i>" not in html
    assert "&lt;img src=x onerror=1&gt;" in html


def test_the_page_holds_the_figures(page: str, made: EvaluationReport) -> None:
    best = made.accuracy.best_of_n["multimodal"]["8"].value
    assert f'<div class="big">{100 * best:.1f}\u00a0%</div>' in page
    assert page.count('<svg class="chart"') == 6
    assert f'<td class="n">{made.step["multimodal"].auroc:.3f}</td>' in page
    assert "Judge – Expert" in page
    assert "2 min 31 s" in page
    assert "engine 1" in page
    assert "4 min 06 s" in page  # all steps
    assert len(made.disagreements) == 2
    steps = sum(len(s.steps) for e in (*made.examples, *made.disagreements) for s in e.solutions)
    assert page.count('class="step" style=') == steps - 2
    assert page.count('class="step disputed" style=') == 2
    assert "Where the scorer and the expert disagree most" in page
    assert "Multimodal against each label source" in page
    assert "No temperature was fitted" in page


def test_an_image_that_cannot_be_opened_is_told(made: EvaluationReport) -> None:
    def broken(uri: str) -> Picture.Image:
        raise RowError("image_corrupt", f"{uri} is not an image")

    html = report.render(made, broken)
    assert html.count("cannot be opened") == 8
    assert "<img" not in html


def test_pictures_are_scaled_to_be_seen() -> None:
    def decode(size: tuple[int, int], mode: str) -> Picture.Image:
        data = report.picture("x", lambda uri: Picture.new(mode, size))
        assert data is not None
        return Picture.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))

    assert decode((80, 40), "L").size == (360, 180)
    assert decode((2000, 1000), "RGBA").size == (720, 360)
    assert decode((500, 400), "P").size == (500, 400)
    assert report.picture("/nowhere.png", open_picture) is None


def test_a_run_without_scores_or_labels_has_a_page(tables: dict[str, Any]) -> None:
    bare = evaluate(
        EvaluateConfig(), **{**tables, "scores": to_arrow(Scores, []), "labels": [], "balances": [], "pairs": []}
    ).report
    html = report.render(bare, open_picture)
    assert "step metrics need one" in html
    assert "No scored case to show" in html
    assert "no scores" in html
    Console(file=io.StringIO()).print(report.summary(bare))


def test_a_run_with_the_text_arm_only(tables: dict[str, Any]) -> None:
    scores = tables["scores"].to_pylist()
    only = [{**row, "arm": "text_only"} for row in scores if row["arm"] == "multimodal"]
    text_alone = {**tables, "scores": to_arrow(Scores, only), "labels": [to_arrow(Labels, [])]}
    html = report.render(evaluate(EvaluateConfig(), **text_alone).report, open_picture)
    assert "Text only, best of 8" in html
    assert "Multimodal − text only" not in html


def test_numbers_as_words() -> None:
    assert [report.percent(x) for x in (0.1234, 1.0, None)] == ["12.3\u00a0%", "100.0\u00a0%", "–"]
    assert [report.fixed(x) for x in (0.12345, -0.5, 1e-6, 0.0, None)] == ["0.123", "−0.500", "1e−06", "0.000", "–"]
    assert [report.signed(x) for x in (1.25, -3.0, -0.01)] == ["+1.2", "−3.0", "0.0"]
    assert [report.count(x) for x in (999, 1234567, None)] == ["999", "1\u202f234\u202f567", "–"]
    assert [report.duration(x) for x in (4.04, 95, 7260)] == ["4.0 s", "1 min 35 s", "2 h 01 min"]


def test_colours_of_probabilities() -> None:
    assert [report.edge(p) for p in (0.0, 0.5, 1.0)] == ["#d55e00", "#b0b2b4", "#0072b2"]
    assert report.tint(1.0) == "#c7e0f1"
    assert 'x="50.0" y="2" width="25.0"' in report.log_odds_bar(3.0)
    assert 'x="0.0" y="2" width="50.0"' in report.log_odds_bar(-30.0)


def test_the_lead_says_what_was_found(made: EvaluationReport) -> None:
    assert made.accuracy.gain is not None
    gain = made.accuracy.gain.best_of_n["8"].value
    assert f"the image is worth {100 * gain:.1f} points" in report.lead(made)


def test_summary_is_short(made: EvaluationReport) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(report.summary(made))
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 16
    assert lines[0].startswith("24 test questions, 184 solutions")
    assert any(line.startswith("Multimodal, best of 8") for line in lines)
    assert "failed rows: solutions 1, scores 3" in stream.getvalue()


def test_figures_against_a_judge_are_shown_by_its_name_and_no_gate_is_held_to_them(tables: dict[str, Any]) -> None:
    judged = evaluate(EvaluateConfig(), **{**tables, "labels": tables["labels"][:1]}).report
    page = report.render(judged, open_picture)
    assert "steps measured against: Judge" in page
    assert "measured against “Judge”, which is no truth" in page
    assert page.count("not measured: no expert") == 2
    stream = io.StringIO()
    Console(file=stream, width=110).print(report.summary(judged))
    assert "steps, multimodal (against judge): AUROC" in stream.getvalue()


def test_end_labels_do_not_overlap() -> None:
    placed = charts._spread([50, 52, 10, 51], 19, 0, 100)
    assert placed[2] == 10
    assert sorted(placed)[1:] == [50, 69, 88]
    assert charts._spread([99, 98], 19, 0, 100) == [100, 81]


def test_markers_and_a_curve_without_data() -> None:
    assert svg.mark("none", 0, 0, "#000") == ""
    assert svg.mark("triangle", 0, 0, "#000").startswith("<polygon")
    empty = CalibrationBin(low=0.0, high=1.0, count=0, weight=0.0, mean_probability=None, share_right=None)
    assert report._bins([empty]) == []
    assert "circle" not in charts.calibration([CalibrationCurve("#000", "circle", [])], "nothing")
    assert charts.histogram([0], [0], "nothing").count("<rect") == 2


def test_labels_of_charts_are_escaped() -> None:
    assert "&lt;b&gt;" in charts.roc([], "<b>")
