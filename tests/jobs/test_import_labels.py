"""A data set's own solutions and labels become the run's tables, where the pipeline looks for them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import export as export_job
from jobs import import_labels as job
from jobs.graph import BY_NAME, MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.imported import imported_rows
from medmm_ray.data.records import Image, Labels, Solution, Solutions, StepLabel
from medmm_ray.data.sources import SolvedQuestion, SourceLabels, SourceSolution
from medmm_ray.data.tables import TableError, write_rows
from medmm_ray.stats.targets import labels_by_solution, targets
from medmm_ray.steps.export import ExportConfig, export
from medmm_ray.steps.ingest import question_rows, read_sources
from tests.data.sources.test_solved import REAL, TREE, flat, published


def curated(tmp_path: Path, source: str, path: Path, dropped: int = 0) -> Run:
    """A run until curate, made in this process; `dropped` questions are left out, as duplicates would be."""
    words = [f"run={tmp_path}/run", f"ingest.sources=[{{name: {source}, path: {path}}}]"]
    run = Run(load_recipe(["jobs/recipes/tiny.yaml", *words]))
    write_rows(run.table("raw_images"), [], Job(run, MAKER["raw_images"]).origin("raw_images"), "image_id")
    images = run.table("raw_images").to_arrow()
    rows = question_rows(read_sources(run.recipe.ingest), images, "")
    assert Image is run.table("images").record
    kept = rows[: len(rows) - dropped]
    write_rows(run.table("questions"), kept, Job(run, MAKER["questions"]).origin("questions"), "question_id")
    return run


def saved(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_med_prms_labels_train_as_their_own(tmp_path: Path) -> None:
    rows = [published(), published(question="Who?", related_docs=[]), flat(question="Why?")]
    path = saved(tmp_path / "train.json", rows)
    run = curated(tmp_path, "med_prm", path)
    with pytest.raises(TableError, match=r"1 of 5 rows failed \(label_count 1\)"):
        job.import_labels(run)
    run = Run(run.recipe.model_copy(update={"max_error_rate": 0.5}))
    made = job.import_labels(run)  # goes on where it stopped
    assert made == {"judge_labels": 5, "monte_carlo_labels": 3, "evidence": 3}
    assert run.is_complete(BY_NAME["sample"])
    assert run.is_complete(BY_NAME["judge"])
    assert run.is_complete(BY_NAME["monte_carlo"])
    assert not run.is_complete(BY_NAME["review"])
    manifest = run.table("judge_labels").manifest()
    assert manifest.config == {"imported": "med_prm", "path": str(path)}
    assert manifest.errors == {"label_count": 1}
    names = ("judge_labels", "monte_carlo_labels")
    found = labels_by_solution([row for name in names for row in run.table(name).to_arrow().to_pylist()])
    aims = {
        policy: sorted(targets(policy, rows, 2) for rows in found.values() if all(not r.error for r in rows))
        for policy in ("judge", "hybrid", "soft")
    }
    assert aims == {"judge": [[1, 1]] * 2, "hybrid": [[1, 0]] * 2, "soft": [[0.125, 0]] * 2}
    evidence = run.table("evidence").to_arrow().to_pylist()
    assert sorted(len(row["documents"]) for row in evidence) == [0, 0, 2]
    solutions = run.table("solutions").to_arrow().to_pylist()
    assert {row["policy"] for row in solutions} == {"imported:med_prm"}


def test_trees_and_questions_that_curate_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "trees.json", [TREE, {**TREE, "question": "Who?\nA. x\nB. y"}])
    run = curated(tmp_path, "meds3", path, dropped=1)
    with caplog.at_level("INFO"), pytest.raises(TableError, match=r"1 of 8 rows failed \(label_value"):
        job.import_labels(run)  # one of four trajectories has a value of 1.5
    assert "1 questions of the source are not in the table questions" in caplog.text
    lax = Run(run.recipe.model_copy(update={"max_error_rate": 0.5}))
    assert job.import_labels(lax) == {"monte_carlo_labels": 8}
    rows = run.table("monte_carlo_labels").to_arrow().to_pylist()
    assert sorted({row["source"] for row in rows}) == ["monte_carlo", "tree_search"]


def test_what_is_there_is_never_replaced_and_what_is_not_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "train.json", [published()])
    run = curated(tmp_path, "med_prm", path)
    write_rows(run.table("judge_labels"), [], Job(run, MAKER["judge_labels"]).origin("judge_labels"), "question_id")
    with pytest.raises(TableError, match="is there already; an import never replaces a table"):
        job.import_labels(run)
    with pytest.raises(TableError, match=r"questions.* is not complete"):
        job.import_labels(Run(run.recipe.model_copy(update={"run": str(tmp_path / "none")})))


def test_the_job_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--help"]) == 0
    assert "import" in capsys.readouterr().out
    assert job.main(["jobs/recipes/tiny.yaml", f"run={tmp_path}"]) == 2
    assert "none of ingest.sources (phantom) brings solutions; those that do: med_prm" in capsys.readouterr().err


def test_expert_labels_complete_the_review(tmp_path: Path) -> None:
    run = curated(tmp_path, "med_prm", saved(tmp_path / "in" / "train.json", [published()]))
    job.import_labels(run)
    out = tmp_path / "out"
    export(export_job.tables_of(run), ExportConfig(to=str(out)), {})
    rows = json.loads((out / "train.json").read_text())
    rows[0]["solutions"][0]["expert_review"] = {"reviewed": True, "expert_label": [1, 0], "feedback": ["", "no"]}
    (out / "train.json").write_text(json.dumps(rows))
    again = curated(tmp_path / "again", "medmm", out)
    made = job.import_labels(again)
    assert made == {"solutions": 1, "judge_labels": 1, "monte_carlo_labels": 1, "expert_labels": 1, "evidence": 1}
    assert again.is_complete(BY_NAME["review"])
    own, back = (r.table("questions").to_arrow(["question_id", "dataset"]).to_pylist() for r in (run, again))
    assert own == back
    documents = [r.table("evidence").to_arrow(["documents"]).to_pylist() for r in (run, again)]
    assert documents[0] == documents[1]


def test_trees_go_out_and_come_back(tmp_path: Path) -> None:
    run = curated(tmp_path, "med_prm", saved(tmp_path / "in" / "train.json", [published(), published(question="Who?")]))
    job.import_labels(run)
    first, second = sorted(run.table("questions").to_arrow()["question_id"].to_pylist())
    found = [
        Solution(solution_id=f"t{i}", index=i, text=f"Step 1: Look.\nStep 2: So ({a}).", steps=["Look.", f"So ({a})."],
                 answer=a, correct=a == "A", finish_reason="stop", seed=7, text_sha="x")
        for i, a in enumerate("AB")
    ]  # fmt: skip
    values = {"t0": [(1, 0.1), (1, 1.0)], "t1": [(1, 1 / 3), (0, 0.0)]}
    labels = [
        Labels(question_id=first, solution_id=name, source="tree_search", annotator="p@c", cost=0.0,
               steps=[StepLabel(label=label, value=value) for label, value in steps])
        for name, steps in values.items()
    ]  # fmt: skip
    grown = [
        Solutions(question_id=q, policy="p", config_hash="c", num_requested=2, solutions=found if q == first else [])
        for q in (first, second)
    ]
    for name, rows in (("tree_solutions", grown), ("tree_labels", labels)):
        write_rows(run.table(name), rows, Job(run, MAKER[name]).origin(name), "question_id")
    counts = export(export_job.tables_of(run), ExportConfig(to=str(tmp_path / "out")), {})
    assert (counts["solutions of trees"], counts["tree_search labelled"]) == (2, 2)

    again = curated(tmp_path / "again", "medmm", tmp_path / "out")
    made = job.import_labels(again)
    assert (made["tree_solutions"], made["tree_labels"], again.is_complete(BY_NAME["tree_search"])) == (2, 2, True)
    back = {row["question_id"]: row["solutions"] for row in again.table("tree_solutions").to_arrow().to_pylist()}
    assert [(s["text"], s["steps"], s["answer"], s["correct"]) for s in back[first]] == [
        (s.text, s.steps, s.answer, s.correct) for s in found
    ]
    assert back[second] == []
    told = {row["solution_id"]: row for row in again.table("tree_labels").to_arrow().to_pylist()}
    assert {row["source"] for row in told.values()} == {"tree_search"}
    assert [[(s["label"], s["value"]) for s in told[s["solution_id"]]["steps"]] for s in back[first]] == list(
        values.values()
    )
    samples = {s["solution_id"] for row in again.table("solutions").to_arrow().to_pylist() for s in row["solutions"]}
    assert not samples & set(told)
    assert not run.is_complete(BY_NAME["tree_search"])  # its own has no trees


def test_an_unknown_source_of_labels_is_a_fault_of_the_reader() -> None:
    row = SourceLabels(source="gossip", annotator="x")
    solution = SourceSolution(text="", steps=[], answer=None, correct=None, labels=[row])
    with pytest.raises(KeyError, match="gossip"):
        imported_rows("q1", SolvedQuestion(solutions=[solution]), "p", "h", "t")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"Med-PRM's records are not at {REAL}")
def test_the_real_records_go_in_and_out(tmp_path: Path) -> None:
    run = curated(tmp_path, "med_prm", REAL / "med_prm")
    assert job.import_labels(run) == {"solutions": 100, "judge_labels": 200, "monte_carlo_labels": 100}
    export(export_job.tables_of(run), ExportConfig(to=str(tmp_path / "out")), {})
    again = curated(tmp_path / "again", "medmm", tmp_path / "out")
    assert job.import_labels(again) == {"solutions": 100, "judge_labels": 99, "monte_carlo_labels": 100}
    both = [{s["question_id"]: [(x["text"], x["steps"], x["answer"], x["correct"]) for x in s["solutions"]]
             for s in r.table("solutions").to_arrow().to_pylist()} for r in (run, again)]  # fmt: skip
    assert both[0] == both[1]
