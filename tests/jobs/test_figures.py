"""Documents say what the runs gave: figures are taken, written and checked."""

import json
from pathlib import Path

import pytest

from jobs import figures
from medmm_ray.config import ConfigError


def test_the_documents_have_the_figures_of_their_runs() -> None:
    figures.check(figures.DOCUMENTS)


def test_a_document_is_written_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = {"value": 0.3172, "low": 0.2907, "high": 0.344}
    report = {
        "n": 4,
        "counts": {"split": "test", "questions": 1200},
        "accuracy": {
            "one_sample": share,
            "oracle": {"4": {"value": 0.9, "low": None, "high": None}},
            "majority": {"4": {"value": 0.25, "low": None, "high": None}},
            "best_of_n": {"multimodal": {"4": {"value": 0.905, "low": 0.86, "high": 0.945}}},
        },
        "step": {"multimodal": {"auroc": 0.9624, "histogram": []}},
        "environment": {},
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    assert figures.main(["take", str(run), "mine"]) == 0
    text = (
        "Before.\n<!-- table mine accuracy -->\nold\n<!-- /table -->\n"
        "AUROC <!-- figure mine step.multimodal.auroc .2f -->.11<!-- /figure -->, "
        "of <!-- figure mine questions , -->1<!-- /figure --> questions "
        "<!-- figure mine one_sample.value .1% -->0 %<!-- /figure -->."
    )
    assert figures.written(text) == (
        "Before.\n<!-- table mine accuracy -->\n"
        "| 1,200 held-out questions, 4 solutions each | accuracy | 95 % interval |\n|---|---|---|\n"
        "| one sample | 31.7 % | 29.1 – 34.4 |\n| majority vote | 25.0 % | – |\n"
        "| **best of 4, multimodal** | **90.5 %** | 86.0 – 94.5 |\n<!-- /table -->\n"
        "AUROC <!-- figure mine step.multimodal.auroc .2f -->.96<!-- /figure -->, "
        "of <!-- figure mine questions , -->1,200<!-- /figure --> questions "
        "<!-- figure mine one_sample.value .1% -->31.7 %<!-- /figure -->."
    )
    document = tmp_path / "doc.md"
    document.write_text(text)
    with pytest.raises(ConfigError, match=r"doc.md has other figures than docs/figures; write them"):
        figures.check([document])
    document.write_text(figures.written(text))
    figures.check([document])


def test_rows_of_a_benchmark_are_a_table(tmp_path: Path) -> None:
    rows = [{"name": "time", "baseline": 60.0, "ours": 31.42, "ratio": 0.5237, "target": "≤ 1", "unit": "s"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert figures.bench_table(figures.taken(str(tmp_path / "rows.json"))) == (
        "| measured | baseline | ours | ratio | target |\n|---|---|---|---|---|\n"
        "| time | 60 s | 31.42 s | 0.524 | ≤ 1 |\n"
    )


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["take", str(tmp_path), "x"]) == 2
    assert "has no report.json; name the folder of an evaluated run" in capsys.readouterr().err
