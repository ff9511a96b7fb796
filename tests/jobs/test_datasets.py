"""python -m jobs.datasets, and jobs.ingest --check."""

import json
import time
from pathlib import Path

import pytest

from jobs import datasets
from jobs.ingest import _main as ingest_main
from medmm_ray.data.benchmark_hashes import Guard, load
from medmm_ray.data.datasets import data_sets
from medmm_ray.steps.ingest import SourceConfig, read_source
from tests.data.sources.test_table import png

SLAKE = {"qid": 1, "img_id": 3, "img_name": "x/source.jpg", "question": "Which organ is it that we see here?",
         "answer": "Liver", "q_lang": "en", "location": "Abdomen", "answer_type": "OPEN"}  # fmt: skip
MMLU = "A lesion of the nerve at its foramen will cause on the same side?,paralysis,loss of taste,both,none,B\n"


def test_list_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert datasets.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name[:8] in printed for name in data_sets())
    assert datasets.main(["mimic_cxr"]) == 0
    assert "access: credentialed" in capsys.readouterr().out
    assert datasets.main(["slak"]) == 2
    assert "'slak' is no declared data set; those are agentclinic_nejm" in capsys.readouterr().err


def test_a_copy_is_compared_with_what_is_declared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.json").write_text(json.dumps([SLAKE] * 2))
    assert datasets.main(["slake", "--check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "slake test: 2 (WRONG: 1,061 are declared)",
        "slake train: 0 (missing; 4,919 are declared)",
        "slake validation: 0 (missing; 1,053 are declared)",
    ]


def test_hashes_of_a_test_set_guard_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "anatomy_test.csv").write_text(MMLU)
    to = tmp_path / "exam.parquet"
    assert datasets.main(["mmlu", "--hash", str(tmp_path), "--to", str(to)]) == 0
    assert "hashes of 1 test questions; name it in curate.guard" in " ".join(capsys.readouterr().out.split())
    (question,) = read_source(SourceConfig(name="mmlu", path=str(tmp_path))).questions
    assert Guard([load("exam", to.read_bytes())]).find(question) == "exam"
    assert datasets.main(["mmlu", "--hash", str(tmp_path)]) == 2


def test_what_may_not_be_downloaded_says_how_it_is_got(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert datasets.main(["mimic_cxr", "--download", str(tmp_path)]) == 2
    assert "cannot be downloaded from here (credentialed). physionet.org" in capsys.readouterr().err


def test_a_download_asks_the_hub_for_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: calls.append((name, settings)))
    assert datasets.main(["path_vqa", "--download", str(tmp_path)]) == 0
    settings = {"repo_type": "dataset", "revision": "main", "local_dir": str(tmp_path)}
    assert calls == [("flaviagiammarino/path-vqa", settings)]


def test_the_first_rows_are_reported_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    rows = "".join(f"a.png,Question {number}?,yes,p{number % 7}\n" for number in range(50_000))
    (tmp_path / "train.csv").write_text(f"file,question,answer,patient\n{rows}b.png,Q?,,p1\n")
    columns = "{images: [file], group: patient, constants: {modality: radiology}}"
    source = f"{{name: mine, reader: table, path: {tmp_path}, columns: {columns}, files: {{train: [train.csv]}}}}"
    started = time.monotonic()
    assert ingest_main(["--check", "jobs/recipes/tiny.yaml", f"ingest.sources=[{source}]", "run=nowhere"]) == 0
    assert time.monotonic() - started < 60
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "mine: 100 questions, 1 images, 0 documents at a first look",
        "  split: train 100",
        "  answer_type: yes_no 100",
        "  modality: radiology 100",
        "  difficulty: (none) 100",
        "  dataset: mine 100",
        "  groups (patients, studies, pictures): 7",
        "  images: 20 x 10 (1)",
    ]
