"""A finished run leaves as a release: what is in it, what stops it, and that it is the same when it is made again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.compare import read_run
from jobs.release import main
from medmm_ray.release.datasheet import SHEET
from tests.doubles.finished_run import FinishedRun, make
from tests.doubles.local_hub import running
from tests.paths import ROOT

SOURCES = {"vqa_rad": 6, "clinic": 2, "mimic_cxr": 4}
OPEN = "exclude=[mimic_cxr, clinic, textbooks]"
SECTIONS = [  # of Gebru et al.
    "Motivation", "Composition", "Collection process", "Preprocessing, cleaning, labelling", "Uses", "Distribution",
    "Maintenance",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make(tmp_path_factory.mktemp("finished"), SOURCES)


@pytest.fixture(scope="module")
def public(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may be released to everybody."""
    folder = tmp_path_factory.mktemp("release") / "public"
    assert (
        main([*finished.words, f"release.to={folder}", OPEN, "license=cc-by-4.0", "release.answers.funding=Nobody."])
        == 0
    )
    return folder


def front_of(card: Path) -> dict[str, object]:
    front: dict[str, object] = yaml.safe_load(card.read_text().split("---\n")[1])
    return front


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_source_that_may_not_be_passed_on_stops_a_public_release_with_its_rows_and_what_to_do(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*finished.words, f"to={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "mimic_cxr (PhysioNet Credentialed Health Data License 1.5.0): only holders of an account that is checked may "
        "read it, its licence is not one that lets everybody pass it on: 4 questions (q0008, q0009, q0010, …) and "
        "evidence of 1 questions"
    ) in error
    assert "clinic (no licence): its licence is not declared: 2 questions (q0006, q0007)" in error
    assert "textbooks (no licence): its licence is not declared: evidence of 1 questions" in error
    assert "release.exclude=[clinic, mimic_cxr, textbooks]" in error
    assert "release.private=true" in error
    assert "release.licences.clinic=" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (["private=true"], None),
        (["exclude=[mimic_cxr]", "release.licences.clinic=cc-by-4.0", "release.licences.textbooks=cc-by-nc-4.0"], None),
        (["exclude=[mimic_cxr, textbooks]", "release.licences.clinic=cc-by-nc-nd-4.0"], "forbids derivatives"),
        (["exclude=[clinic, textbooks]", "release.licences.mimic_cxr=mit"], "an account that is checked"),
        (["exclude=[mimic]"], "names 'mimic', and nothing in this run comes from it; its sources are "),
        (["private=true", "release.answers.colour=red"], "release.answers names 'colour'; the datasheet asks purpose"),
        (["push=prm"], "release.push is 'prm'; a repository of the hub is named org/name"),
        (["to=s3://a/b", "push=me/prm"], "release.push needs a local folder, s3://a/b is none"),
        (["models.two_tower=org/prm"], "the run's scorer is org/prm, which it was given and did not train"),
    ],
)
def test_what_stops_a_release_and_what_does_not(
    words: list[str], stops: str | None, finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [] if any("two_tower" in word for word in words) else ["parts=[dataset]"]
    code = main([*finished.words, f"to={tmp_path / 'out'}", *parts, *words])
    assert (code, stops or "") == (2 if stops else 0, stops or "")
    assert (stops or "") in capsys.readouterr().err


def test_nothing_of_an_excluded_source_and_no_path_is_in_it(public: Path, finished: FinishedRun) -> None:
    rows = []
    for file in sorted((public / "dataset" / "data").glob("*.parquet")):
        rows += pq.read_table(file).to_pylist()
    assert [row["question_id"] for row in rows] == [f"q{number:04d}" for number in range(6)]
    assert {row["dataset"] for row in rows} == {"vqa_rad"}
    assert rows[0]["related_documents"] == rows[0]["related_images"] == []
    files = files_of(public)
    assert {name for name in files if name.startswith("dataset/images/")} == {
        f"dataset/images/im{number:04d}.png" for number in range(6)
    }
    for name, content in files.items():
        text = content.decode(errors="ignore")
        assert not re.search(r"q00(0[6-9]|1\d)\b.*\?", text), name
        assert not re.search(r"\((mimic_cxr|clinic) \d+\)", text), name
        assert "A page of a textbook." not in text
        assert str(Path(finished.run.root).parent) not in text, name
        assert "/home/a" not in text, name
    outcomes = pq.read_table(public / "model" / "reports" / "outcomes.parquet")
    assert outcomes["question_id"].to_pylist() == [f"q{number:04d}" for number in range(6)]


def test_step_scores_stand_with_the_solutions_by_med_prms_names(public: Path, finished: FinishedRun) -> None:
    by_id = {}
    for row in finished.run.table("scores").to_arrow().to_pylist():
        if row["arm"] == "multimodal" and row["error"] is None:
            sums = [text + image for text, image in zip(row["text_log_odds"], row["image_log_odds"], strict=True)]
            by_id[row["solution_id"]] = [1 / (1 + 2.718281828459045**-total) for total in sums]
    (file,) = (public / "dataset" / "data").glob("*.parquet")
    solutions = [solution for row in pq.read_table(file).to_pylist() for solution in row["solutions"]]
    assert len(solutions) == 6 * 4
    for solution in solutions:
        expected = by_id.get(solution["solution_id"])
        if expected is None:  # the one that could not be scored
            assert (solution["PRM_min_score"], solution["PRM_score_list"]) == (None, None)
            continue
        assert solution["PRM_score_list"] == pytest.approx(expected, abs=1e-6)
        assert solution["PRM_min_score"] == pytest.approx(min(expected), abs=1e-6)
        assert solution["PRM_score"] == pytest.approx(expected[-1], abs=1e-6)


def test_the_model_card_has_base_models_data_sets_and_figures_with_intervals(
    public: Path, finished: FinishedRun
) -> None:
    card = public / "model" / "README.md"
    front = front_of(card)
    assert (front["base_model"], front["license"]) == (["org/base"], "other")
    index = front["model-index"]
    assert isinstance(index, list)
    report = read_run(finished.run.uri("report"), "").report
    figure = report.by_dataset["vqa_rad"].best_of_n["multimodal"]
    metrics = [
        metric
        for result in index[0]["results"]
        if result["dataset"]["name"] == "vqa_rad"
        for metric in result["metrics"]
    ]
    assert figure.low is not None
    assert figure.high is not None
    name = f"best of 4, multimodal (95 % interval {100 * figure.low:.1f} to {100 * figure.high:.1f})"
    assert {"type": "accuracy", "name": name, "value": round(figure.value, 6)} in metrics
    text = card.read_text()
    assert "[org/base](https://huggingface.co/org/base) | `c0ffee` |" in text
    assert (
        "- MIMIC-CXR-JPG (PhysioNet Credentialed Health Data License 1.5.0; access: credentialed), not in the" in text
    )
    assert "whether weights that were trained on them may be published" in text
    for drawing in re.findall(r"\]\((figures/\w+\.svg)\)", text):
        assert (public / "model" / drawing).read_text().startswith("<svg ")
    described = json.loads((public / "model" / "reward_model.json").read_text())
    assert described["figures"] == {"loss": 0.25}


def test_the_released_model_is_the_runs(public: Path) -> None:
    from medmm_ray.reward_model import RewardModel

    model = RewardModel.from_pretrained(public / "model")
    assert len(model.score("Which? (A) a (B) b", [["one", "so (A)"]])[0].log_odds) == 2


def test_the_datasheet_answers_or_asks_in_all_seven_sections(public: Path) -> None:
    card = public / "dataset" / "README.md"
    assert front_of(card)["license"] == ["cc-by-4.0", "cc0-1.0"]
    sheet = card.read_text().partition("## Datasheet")[2]
    assert re.findall(r"^### (.*)$", sheet, re.M) == SECTIONS
    asked = re.findall(r"\*\*(.*?)\*\* \*A question for the author \(`release\.answers\.(\w+)`\)", sheet)
    listed = re.findall(r"^- `(\w+)`: (.*)$", (public / "README.md").read_text(), re.M)
    assert [(name, words) for words, name in asked] == listed
    assert "**Who funded it?** Nobody." in sheet
    assert {"purpose", "ethics", "consent", "maintainers"} <= {name for name, _ in listed}
    assert "funding" not in dict(listed)
    assert "6 questions with 6 pictures, 24 sampled solutions of 96 steps" in sheet
    assert "mimic_cxr stayed behind: 4 questions" in sheet
    assert "| vqa_rad | CC0 1.0 | open | 6 questions" in sheet
    assert sum(len(questions) for questions in SHEET.values()) == sheet.count("**") // 2


def test_the_release_list_has_gates_targets_and_what_people_do(public: Path) -> None:
    lines = (public / "README.md").read_text()
    assert "| Licences | yes | each source may be passed on |" in lines
    assert "| Identifiers of persons are left out | no | not looked for: curate.phi=drop |" in lines
    assert "| Questions, radiology | no | 12 of 4,000 planned |" in lines
    assert "| Best of 4, medqa | not measured | wanted 82.5 % |" in lines
    assert "| The demo was tried by ten people | for the author |  |" in lines
    assert "Expected calibration error, multimodal" in lines
    assert "Judge agrees with the expert" in lines


def test_checksums_hold_and_a_second_time_changes_nothing(
    public: Path, finished: FinishedRun, caplog: pytest.LogCaptureFixture
) -> None:
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=public, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")
    before = files_of(public)
    times = {file: file.stat().st_mtime_ns for file in public.rglob("*")}
    words = [*finished.words, f"release.to={public}", OPEN, "license=cc-by-4.0", "release.answers.funding=Nobody."]
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert f"{public}: complete already" in caplog.text
    assert times == {file: file.stat().st_mtime_ns for file in public.rglob("*")}
    (public / "model" / "README.md").unlink()
    assert main(words) == 0
    assert files_of(public) == before, "made anew it has the same bytes"
    assert len(before["SHA256SUMS"].splitlines()) == len(before) - 1


def test_a_folder_that_is_no_release_is_left_alone(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("Years of work.")
    assert main([*finished.words, f"to={tmp_path}", "private=true"]) == 2
    assert "has files and is no release" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "Years of work."


def test_it_goes_to_the_hub_by_name(finished: FinishedRun, tmp_path: Path) -> None:
    """In a process of its own, as huggingface_hub reads its environment when it is imported."""
    with running() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        words = [*finished.words, f"to={tmp_path / 'out'}", OPEN, "push=me/prm"]
        command = [sys.executable, "-m", "jobs.release", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("pushed: ") == 2
        model, both = list(hub.commits.values())[1:]
    assert hub.private == {"me/prm": False}
    written = files_of(tmp_path / "out")
    of_model = {name.removeprefix("model/") for name in written if name.startswith("model/")}
    of_dataset = {name.removeprefix("dataset/") for name in written if name.startswith("dataset/")}
    assert set(model) == of_model
    assert set(both) == of_model | of_dataset
    assert both["README.md"] == written["dataset/README.md"]
    assert 'RewardModel.from_pretrained("me/prm")' in model["README.md"].decode()
