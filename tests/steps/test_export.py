"""A run leaves as the published JSON and as a hub's folder, and comes back as it was."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import export as job
from jobs.graph import MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import ConfigError
from medmm_ray.data.records import (
    Evidence,
    Image,
    Labels,
    Question,
    RetrievedDocument,
    RetrievedImage,
    Scores,
    Solution,
    Solutions,
    StepLabel,
    Vector,
    from_dict,
)
from medmm_ray.data.sources import SourceRequest, medmm
from medmm_ray.data.tables import RowError, Table, write_rows
from medmm_ray.steps.export import ExportConfig, Tables, bundles, export, shard_schema
from medmm_ray.text import one_line
from tests.doubles.local_hub import running

TINY = "jobs/recipes/tiny.yaml"
RECORDS: dict[str, type] = {"questions": Question, "solutions": Solutions, "evidence": Evidence, "images": Image,
                            "judge_labels": Labels, "monte_carlo_labels": Labels, "expert_labels": Labels,
                            "tree_solutions": Solutions, "tree_labels": Labels}  # fmt: skip


def question(number: int, **changes: Any) -> Question:
    known: dict[str, Any] = {
        "question_id": f"q{number}", "source": "vqa_rad", "split": "train" if number % 2 else "test",
        "modality": "radiology", "difficulty": "easy", "question": f"What is {number}?", "options": ["one", "two"],
        "answer": "B", "answer_type": "choice", "image_ids": [],
    }  # fmt: skip
    return Question(**{**known, **changes})


def solution(question_id: str, index: int, steps: Sequence[str] = ("Look.", "So (B)."), **changes: Any) -> Solution:
    known: dict[str, Any] = {
        "solution_id": f"{question_id}-s{index}", "index": index, "text": "Step 1: Look.\nStep 2: So (B).",
        "steps": list(steps), "answer": "B", "correct": True, "finish_reason": "stop", "seed": 7, "text_sha": "x",
    }  # fmt: skip
    return Solution(**{**known, **changes})


def solved(question_id: str, *found: Solution) -> Solutions:
    return Solutions(question_id=question_id, policy="p", config_hash="h", num_requested=2,
                     solutions=list(found))  # fmt: skip


def labels(of: Solution, source: str, steps: Sequence[StepLabel], annotator: str = "x", **changes: Any) -> Labels:
    known: dict[str, Any] = {"question_id": of.solution_id.partition("-")[0], "solution_id": of.solution_id,
                             "source": source, "annotator": annotator, "steps": list(steps), "cost": 0.5}  # fmt: skip
    return Labels(**{**known, **changes})


def write(root: Path, **rows: Sequence[Any]) -> Run:
    """A run with these tables, as if the pipeline had made them."""
    run = Run(load_recipe([TINY, f"run={root}"]))
    for name, found in rows.items():
        key = {"images": "image_id", "image_vectors": "item_id"}.get(name, "question_id")
        write_rows(run.table(name), found, Job(run, MAKER[name]).origin(name), key)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three questions of two splits; one has an image, documents and labels of every kind."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"a picture")
    first, second = solution("q1", 0), solution("q1", 1, answer=None, correct=None)
    image = Image(image_id="im1", uri=str(picture), sha256="s", perceptual_hash="p", width=1, height=1, split="train",
                  modality="radiology", diagnosis="d", annotation="{}")  # fmt: skip
    found = Evidence(
        question_id="q1", config_hash="h",
        documents=[RetrievedDocument(document_id="d1", text="A guideline.", score=0.9)],
        images=[RetrievedImage(image_id="im2", uri="b.png", diagnosis="effusion", similarity=0.92)],
    )  # fmt: skip
    return write(
        tmp_path / "run",
        questions=[question(1, image_ids=["im1"]), question(2), question(3, options=[], answer="yes",
                   answer_type="yes_no"), question(5, error="answer_empty: none")],
        solutions=[solved("q1", first, second), solved("q2", solution("q2", 0)), solved("q3")],
        images=[image],
        image_vectors=[Vector(item_id="im1", vector=[0.5, 0.25])],
        evidence=[found],
        judge_labels=[
            labels(first, "judge", [StepLabel(label=1, confidence="high"), StepLabel(label=0, confidence="low")]),
            labels(second, "judge", [], error="refused: safety"),
        ],
        monte_carlo_labels=[labels(first, "monte_carlo", [StepLabel(), StepLabel(label=1, value=0.25, num_correct=1,
                                   num_rollouts=4)])],
        expert_labels=[
            labels(first, "expert", [StepLabel(label=0, reason="no"), StepLabel(label=0)], "dr a"),
            labels(first, "expert", [StepLabel(label=1, reason="yes"), StepLabel()], "adjudicator"),
        ],
    )  # fmt: skip


def exported(run: Run, to: Path, **config: Any) -> dict[str, int]:
    return export(job.tables_of(run), ExportConfig(to=str(to), **config), {"sample": ("f", {"temperature": 0.7})})


def test_several_readers_are_one_column_by_majority(tmp_path: Path) -> None:
    only = solution("q1", 0)
    right, wrong = StepLabel(label=1, reason="yes"), StepLabel(label=0, reason="no")
    readers = [labels(only, "expert", steps, name) for name, steps in (
        ("anna", [wrong, wrong]), ("ben", [right, right]), ("cora", [right, StepLabel()]))]  # fmt: skip
    written = medmm.entry(question(1), [only], {only.solution_id: readers})["solutions"][0]["expert_review"]
    assert written == {"reviewed": True, "expert_label": [1, None], "feedback": ["yes", None]}


def score_row(arm: str, index: int, log_odds: list[float], error: str | None = None) -> Scores:
    return Scores(question_id="q1", solution_id=f"q1-s{index}", model="m", arm=arm, text_log_odds=log_odds,
                  image_log_odds=[0.5] * len(log_odds), error=error)  # fmt: skip


def test_step_scores_go_along_by_the_names_that_med_prm_has(run: Run, tmp_path: Path) -> None:
    """Log-odds 1.5 and -0.5 are .8176 and .3775; an arm that failed is passed over for the text's."""
    rows = [
        score_row("text_only", 0, [9.0, 9.0]),
        score_row("multimodal", 0, [-1.0, 1.0]),
        score_row("text_only", 1, [1.0, -1.0]),
        score_row("multimodal", 1, [], "image_corrupt: x"),
    ]
    scores = Table(run.uri("scores"), Scores)
    write_rows(scores, rows, Job(run, MAKER["scores"]).origin("scores"), "solution_id")
    exported(run, tmp_path / "out")
    (entry, _) = json.loads((tmp_path / "out" / "train.json").read_text())
    first, second = entry["solutions"]
    assert first["PRM_score_list"] == pytest.approx([0.3775407, 0.8175745])
    assert (first["PRM_min_score"], first["PRM_score"]) == pytest.approx((0.3775407, 0.8175745))
    assert second["PRM_score_list"] == pytest.approx([0.8175745, 0.3775407])
    exported(run, tmp_path / "shuffled", score_arm="shuffled_image")
    (entry, _) = json.loads((tmp_path / "shuffled" / "train.json").read_text())
    assert "PRM_min_score" not in entry["solutions"][0]


def test_the_published_fields(run: Run, tmp_path: Path) -> None:
    counts = exported(run, tmp_path / "out", embeddings=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train.json", "test.json"}
    rows = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [row["question_id"] for row in rows] == ["q1", "q3"]  # q5 has an error
    assert rows[0] == {
        "question_id": "q1",
        "data_source": "vqa_rad",
        "modality": "radiology",
        "difficulty": "easy",
        "question": "What is 1?",
        "image_path": str(tmp_path / "a.png"),
        "image_embedding": [0.5, 0.25],
        "options": ["one", "two"],
        "correct_answer": "B",
        "related_docs": ["A guideline."],
        "related_images": [{"image_path": "b.png", "diagnosis": "effusion", "similarity": 0.92}],
        "solutions": [
            {
                "solution": "Step 1: Look.\nStep 2: So (B).",
                "prm_processed_solution": "Step 1: Look. ки Step 2: So (B). ки",
                "answer": "B",
                "score": 1,
                "gemini_labels": [1, 0],
                "gemini_confidence": ["high", "low"],
                "monte_carlo_labels": [None, 1],
                "expert_review": {"reviewed": True, "expert_label": [1, 0], "feedback": ["yes", None]},
            },
            {
                "solution": "Step 1: Look.\nStep 2: So (B).",
                "prm_processed_solution": "Step 1: Look. ки Step 2: So (B). ки",
                "answer": None,
                "score": 0,
                "gemini_labels": None,
                "gemini_confidence": None,
                "monte_carlo_labels": None,
                "expert_review": {"reviewed": False, "expert_label": None, "feedback": None},
            },
        ],
    }
    assert counts == {
        "questions": 3, "questions train": 2, "questions test": 1, "solutions": 3, "steps": 6, "judge labelled": 1,
        "judge failed": 1, "monte_carlo labelled": 1, "expert labelled": 2,
    }  # fmt: skip


def test_chunks_change_nothing(run: Run, tmp_path: Path) -> None:
    exported(run, tmp_path / "whole")
    exported(run, tmp_path / "one", questions_per_shard=1)
    for name in ("train.json", "test.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
STEP = WORDS.map(one_line).filter(bool)
LABEL = st.sampled_from([0, 1, None])
OPTIONS: st.SearchStrategy[list[str]] = st.just([]) | st.lists(WORDS, min_size=2, max_size=10)
YES = st.booleans()
VALUE = st.none() | st.floats(0, 1)
CONFIDENCE = st.sampled_from(["high", "medium", "low", None])


@st.composite
def runs(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Tables of up to four questions, as the pipeline could make them."""
    rows: dict[str, list[Any]] = {name: [] for name in RECORDS if name not in ("evidence", "images")}
    for number in range(draw(st.integers(1, 4))):
        options = draw(OPTIONS)
        own = question(
            number, question=draw(WORDS), difficulty=draw(WORDS), options=options,
            answer="A" if options else draw(st.sampled_from(["yes", "left lung"])),
        )  # fmt: skip
        kind = "choice" if options else "yes_no" if own.answer == "yes" else "open"
        rows["questions"].append(replace(own, answer_type=kind))
        found = []
        for index in range(draw(st.integers(0, 3))):
            answer = draw(st.sampled_from(["A", None]))
            steps = draw(st.lists(STEP, max_size=4))
            correct = draw(YES) if answer else None
            made = solution(f"q{number}", index, steps, text=draw(WORDS), answer=answer, correct=correct)
            found.append(made)
            for source in ("judge", "monte_carlo", "expert"):
                labelled = draw(YES)
                if steps and labelled:
                    sure = CONFIDENCE if source == "judge" else st.none()
                    why = WORDS if source == "expert" else st.none()
                    entries = [StepLabel(label=draw(LABEL), confidence=draw(sure), reason=draw(why)) for _ in steps]
                    rows[f"{source}_labels"].append(labels(made, source, entries))
        rows["solutions"].append(solved(f"q{number}", *found))
        grown = [solution(f"q{number}", 9 + i, draw(st.lists(STEP, min_size=1, max_size=4)), text=draw(WORDS))
                 for i in range(draw(st.integers(0, 2)))]  # fmt: skip
        rows["tree_solutions"].append(solved(f"q{number}", *grown))
        rows["tree_labels"] += [
            labels(made, "tree_search", [StepLabel(label=draw(LABEL), value=draw(VALUE)) for _ in made.steps])
            for made in grown
        ]
    return rows


@given(rows=runs())
@settings(max_examples=25, deadline=None)
def test_what_is_exported_comes_back_exactly(rows: dict[str, list[Any]], tmp_path_factory: Any) -> None:
    folder: Path = tmp_path_factory.mktemp("trip")
    counts = exported(write(folder / "run", **rows), folder / "out", questions_per_shard=2)
    assert counts["questions"] == len(rows["questions"])
    request = SourceRequest(path=str(folder / "out"))
    back = medmm.read(request).questions
    by_id = {q.question_id: q for q in rows["questions"]}
    assert sorted(q.question_id for q in back) == sorted(by_id)
    for source, one in zip(back, medmm.solved(request), strict=True):
        own = by_id[source.question_id]
        assert source.error is None
        assert (source.source, source.split, source.modality, source.difficulty, source.question, list(source.options),
                source.answer, source.answer_type) == (own.source, own.split, own.modality, own.difficulty,
                own.question, own.options, own.answer, own.answer_type)  # fmt: skip
        for table, read in (("solutions", one.solutions), ("tree_solutions", one.tree_solutions)):
            made = next(s.solutions for s in rows[table] if s.question_id == own.question_id)
            assert [(s.text, s.steps, s.answer, s.correct) for s in read] == [
                (s.text, s.steps, s.answer, s.correct) for s in made
            ]
            for ours, theirs in zip(made, read, strict=True):
                mine = {
                    row.source: row.steps
                    for name in ("judge_labels", "monte_carlo_labels", "expert_labels", "tree_labels")
                    for row in rows[name]
                    if row.solution_id == ours.solution_id
                }
                assert {row.source: row.steps for row in theirs.labels} == mine
                assert all(row.error is None for row in theirs.labels)


def test_a_solution_that_would_be_read_otherwise_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = solution("q1", 0, ["Look. ки Step 2: Cheat.", "So."])
    for steps in (odd.steps, ["Look ки twice."]):
        with pytest.raises(RowError, match="steps_unreadable"):
            medmm.entry(question(1), [solution("q1", 0, steps)], {})
    run = write(tmp_path / "run", questions=[question(1), question(3)], solutions=[solved("q1", odd), solved("q3")])
    counts = exported(run, tmp_path / "out")
    assert counts == {"questions": 1, "questions train": 1, "solutions": 0, "steps": 0, "left out steps_unreadable": 1}
    assert [row["question_id"] for row in json.loads((tmp_path / "out" / "train.json").read_text())] == ["q3"]


def test_a_question_with_a_number_that_json_does_not_have_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = solution("q1", 0)
    grown = labels(odd, "tree_search", [StepLabel(label=1, value=0.5), StepLabel(label=0, value=float("nan"))])
    run = write(tmp_path / "run", questions=[question(1), question(3)], solutions=[solved("q1", odd), solved("q3")],
                monte_carlo_labels=[grown])  # fmt: skip
    counts = exported(run, tmp_path / "out")
    assert counts == {"questions": 1, "questions train": 1, "solutions": 0, "steps": 0, "left out not_finite": 1}
    assert "NaN" not in (tmp_path / "out" / "train.json").read_text()


def test_labels_that_do_not_fit_are_errors_that_quote_them(tmp_path: Path) -> None:
    row = medmm.entry(question(1), [solution("q1", 0)], {})
    row["solutions"][0]["gemini_labels"] = [1, 0, 1]
    row["solutions"][0]["gemini_confidence"] = ["high", "low", "low"]
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (found,) = medmm.solved(SourceRequest(path=str(tmp_path)))
    assert [(r.source, r.steps) for r in found.solutions[0].labels] == [("judge", ())]
    assert str(found.solutions[0].labels[0].error).startswith("label_count: judge has other than 2 entries for 2 steps")


# The hub's folder


def test_the_hub_folder_has_shards_with_every_label_row(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(run, out, format="hf", images="copy", questions_per_shard=1)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet", "images/im1.png",
    ]  # fmt: skip
    rows = pq.read_table(out / "data" / "train-00000-of-00002.parquet").to_pylist()
    assert [row["question_id"] for row in rows] == ["q1"]
    assert [image["uri"] for image in rows[0]["images"]] == ["images/im1.png"]
    assert (out / "images" / "im1.png").read_bytes() == b"a picture"
    kept = rows[0]["solutions"]
    first = [from_dict(Labels, {**row, "question_id": "q1", "solution_id": "q1-s0"}) for row in kept[0]["labels"]]
    bundle = next(iter(bundles(job.tables_of(run), ["q1"], ExportConfig())))
    assert rows[0]["tree_solutions"] == []
    assert first == bundle.labels["q1-s0"]
    assert len(first) == 4
    assert kept[1]["labels"][0]["error"] == "refused: safety"
    assert from_dict(Solution, kept[0]) == bundle.solutions[0]


def test_the_card_says_where_the_files_are_and_what_is_in_them(run: Run, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", format="hf", license="cc0-1.0")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc0-1.0"
    assert front["configs"] == [{"config_name": "default", "data_files": [
        {"split": "test", "path": "data/test-*"}, {"split": "train", "path": "data/train-*"}]}]  # fmt: skip
    assert front["dataset_info"]["splits"] == [
        {"name": "test", "num_examples": 1}, {"name": "train", "num_examples": 2}]  # fmt: skip
    features = {feature["name"]: feature for feature in front["dataset_info"]["features"]}
    assert list(features) == shard_schema().names
    assert features["options"] == {"name": "options", "sequence": "string"}
    steps = next(f for f in features["solutions"]["list"] if f["name"] == "labels")["list"]
    assert {"name": "value", "dtype": "float64"} in next(f for f in steps if f["name"] == "steps")["list"]
    assert "| judge labelled | 1 |" in text
    assert "| sample | `f` | temperature=0.7 |" in text


PUSH = """
import sys
from medmm_ray.steps.export import push
print(push(sys.argv[1], "me/steps", private=True))
"""


def test_the_folder_goes_to_a_hub(run: Run, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", format="hf")
    with running() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        files = hub.commits[hub.branches["me/steps@main"]]
    assert sorted(files) == ["README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert hub.private == {"me/steps": True}
    assert hub.lfs_paths == ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]


# The job


def test_the_job_writes_what_the_run_has(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert job.main([TINY, f"run={run.root}", f"to={tmp_path / 'out'}"]) == 0
    assert len(json.loads((tmp_path / "out" / "train.json").read_text())) == 2
    assert "3 questions" in caplog.text
    assert "What is" not in caplog.text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run=/nowhere/at/all", "to=x"], 2, "there is no run at /nowhere/at/all"),
        (["to="], 2, "'to' is"),
        (["to=x", "format=csv"], 2, "'format' is 'csv': Input should be 'json', 'hf' or 'lm_eval'"),
        (["to=x", "push=me/it"], 2, "push=... needs format=hf"),
        (["to=s3://a/b", "format=hf", "push=me/it"], 2, "push=... needs a local folder"),
        (["to=FULL"], 2, "is not empty; an export never mixes with other files"),
        (["to=FULL/a"], 2, "is not empty; an export never mixes with other files"),
        (["to=FULL/a/b"], 1, "cannot write to "),
        (["to=x", "fromat=hf"], 2, "unknown name 'fromat'"),
        (["to=x", "sample.temperature=0.9"], 1, "solutions/"),
    ],
)
def test_bad_arguments_end_in_one_sentence(
    words: list[str], code: int, message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("")
    asked = [word.replace("FULL", str(full)) for word in words]
    first = [] if any(word.startswith("run=") for word in words) else [f"run={run.root}"]
    assert job.main([TINY, *first, *asked]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_the_job_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ExportConfig.model_fields)


def test_an_image_that_is_gone_is_counted_not_fatal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").unlink()
    counts = exported(run, tmp_path / "out", images="copy")
    assert counts["images image_missing"] == 2  # the question's own, and the reference image of its evidence
    assert json.loads((tmp_path / "out" / "train.json").read_text())[0]["image_path"] is None


def test_a_run_without_labels_is_exported_too(tmp_path: Path) -> None:
    run = write(tmp_path / "run", questions=[question(1)], solutions=[solved("q1", solution("q1", 0))])
    tables = job.tables_of(run)
    assert isinstance(tables, Tables)
    assert (tables.labels, tables.evidence) == ({}, None)
    assert exported(run, tmp_path / "out")["solutions"] == 1
    with pytest.raises(ConfigError, match="is not empty"):
        exported(run, tmp_path / "out")
