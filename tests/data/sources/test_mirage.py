"""The leaderboard's rule, its data, and its published table."""

import json
from pathlib import Path

import pytest

from jobs import bench
from jobs.benches.answers import SETS, WITHIN, table
from medmm_ray.config import ConfigError
from medmm_ray.data.source_files import list_files
from medmm_ray.data.sources import SourceRequest, mirage
from medmm_ray.data.tables import TableError
from medmm_ray.text import mirage_answer
from tests.paths import REAL_DATA

REAL = REAL_DATA / "mirage"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("medmcqa/data/dev.json",
         '{"id": "7", "question": "What?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 0}',
         "line 1: cop must be greater than or equal to 1, not 0"),
        ("medmcqa/data/dev.json", "{oops", "line 1 is not valid JSON"),
        ("pubmedqa/data/test_set.json", '{"9": {"QUESTION": "So?", "final_decision": "perhaps"}}',
         "entry 9: final_decision must be 'yes', 'no' or 'maybe', not 'perhaps'"),
        ("pubmedqa/data/test_set.json", '{"9": {"QUESTION": null, "final_decision": "no"}}',
         "entry 9: QUESTION must be text, not null"),
    ],
)  # fmt: skip
def test_a_broken_entry_is_named(name: str, content: str, fault: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "rawdata" / name).write_text(content)
    with pytest.raises(TableError) as caught:
        mirage.read(SourceRequest(path=str(path)))
    assert f"{name} {fault}" in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ('{"step_by_step_thinking": "B: no", "answer_choice": "C"}', "C"),  # what stands before is not read
        ('{"step_by_step_thinking": "...", "answer_choice": "C. fever"}', "C"),
        ('"answer_choice": "B and C"}', "B"),
        ('"answer_choice": "D/A"}', "D"),
        ('"answer_choice": "Option D"}', "D"),
        ('"answer_choice": "None: B"}', "B"),
        ('"answer_choice": "None of the above"}', "A"),
        ('"answer_choice": "E"}', "A"),
        ("C", "C"),
        ("The answer: B", "B"),
        ("the answer is D", "A"),
        ("", "A"),
    ],
)
def test_the_leaderboards_rule(reply: str, letter: str) -> None:
    assert mirage_answer(reply) == letter


def folder(path: Path) -> Path:
    """One question of each set, and two settings of replies."""
    raw = path / "rawdata"
    files = {
        f"mmlu/data/test/{name}_test.csv": 'Which "one"?,w,x,y,z,B\n' if name == "anatomy" else ""
        for name in mirage.MMLU
    }
    files["medqa/data_clean/questions/US/4_options/phrases_no_exclude_test.jsonl"] = json.dumps(
        {
            "question": "Who?",
            "options": {"A": "w", "B": "x", "C": "y", "D": "z"},
            "answer_idx": "C",
            "meta_info": "step1",
        }
    )
    files["medmcqa/data/dev.json"] = json.dumps(
        {
            "id": "7",
            "question": "What?",
            "opa": "w",
            "opb": "x",
            "opc": "y",
            "opd": "z",
            "cop": 4,
            "subject_name": "Anatomy",
        }
    )
    files["pubmedqa/data/test_set.json"] = json.dumps({"9": {"QUESTION": "So?", "final_decision": "maybe"}})
    asked = [{"id": "1", "type": "yesno", "body": "Is it?", "exact_answer": "no"}, {"id": "2", "type": "list"}]
    for task in mirage.BIOASQ:
        files[f"bioasq/{task}/1_golden.json"] = json.dumps({"questions": asked if task == mirage.BIOASQ[0] else []})
    for name, content in files.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(content)
    ids = {"mmlu": "anatomy-000", "medqa": "0000", "medmcqa": "dev_7", "pubmedqa": "9", "bioasq": "1"}
    replies: list[dict[str, object]] = [
        {"dataset": name, "setting": setting, "id": key, "output": output}
        for setting, output in (("cot", '{"answer_choice": "B"}'), ("rag_32", []))
        for name, key in ids.items()
    ]
    (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replies))
    return path


def test_each_set_is_read(tmp_path: Path) -> None:
    questions = mirage.read(SourceRequest(path=str(folder(tmp_path)))).questions
    assert [(q.name, q.question, list(q.options), q.answer) for q in questions] == [
        ("mmlu/anatomy-000", 'Which "one"?', ["w", "x", "y", "z"], "B"),
        ("medqa/0000", "Who?", ["w", "x", "y", "z"], "C"),
        ("medmcqa/dev_7", "What?", ["w", "x", "y", "z"], "D"),
        ("pubmedqa/9", "So?", ["yes", "no", "maybe"], "C"),
        ("bioasq/1", "Is it?", ["yes", "no"], "B"),
    ]
    assert [(q.dataset, q.topic) for q in questions] == [
        ("mmlu", "anatomy"), ("medqa", "step1"), ("medmcqa", "Anatomy"), ("pubmedqa", ""), ("bioasq", ""),
    ]  # fmt: skip


def test_the_bench_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.json"
    assert bench.main(["answers", f"path={folder(tmp_path)}", f"json={rows}"]) == 0
    found = {row["name"]: row["ours"] for row in json.loads(rows.read_text())}
    assert found["cot mmlu: the leaderboard's rule, points from its figure"] == 100
    assert found["cot mean: our extractor beside the rule"] == pytest.approx(40)  # B is the key of two of the five sets
    assert found["rag_32 mean: our extractor beside the rule"] == 0
    assert "100.00 % unread" in " ".join(capsys.readouterr().out.split())
    assert bench.main(["answers"]) == 2
    assert "'path' is required" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"has no \*\.txt file"):
        list_files(str(tmp_path), ".txt")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"MIRAGE is not at {REAL}")
def test_the_published_table_is_reproduced() -> None:
    cells = table(str(REAL))
    assert len(cells) == 2 * (len(SETS) + 1)
    off = {key: cell.grader - cell.published for key, cell in cells.items()}
    assert max(map(abs, off.values())) <= WITHIN, off
    # The extractor guesses nothing: it is right less often than the rule at most by what it leaves unread.
    assert all(cell.grader - cell.unread <= cell.extractor for cell in cells.values())
