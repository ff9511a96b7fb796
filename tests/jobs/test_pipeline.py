"""The whole pipeline on every real engine, once, submitted to a local cluster of three nodes; all end-to-end tests look
at that run.

It lies in an object store: what works there works in a folder too, while a path that is opened as a file does not.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from pyarrow import fs as pafs
from rich.console import Console

from jobs import beam_search, pipeline, query, release
from jobs.graph import BY_NAME, MAKER, STEPS, steps_between
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import ConfigError, JsonObject
from medmm_ray.data.artifacts import filesystem, read_file, read_json, write_file
from medmm_ray.data.tables import Table
from medmm_ray.engines.checkpoints import cache_folder
from tests.doubles.api_server import chat_said, serving
from tests.doubles.local_cluster import LocalCluster, running
from tests.jobs.test_resume import TINY
from tests.pages.review_page.phantom_run import make_run
from tests.paths import ROOT

END_TO_END = pytest.mark.engine
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.timeout(1800)  # the run took 560 s beside other tests on two cores


@dataclass(frozen=True)
class Submitted:
    """Two tries at a run, the driver of the first was killed: exit status, output and errors of each."""

    run: Run
    killed: tuple[int, str, str]
    resumed: tuple[int, str, str]


@pytest.fixture(scope="session")
def submitted(bucket: str, request: pytest.FixtureRequest) -> Iterator[Submitted]:
    words = [TINY, f"run={bucket}/tiny"]
    before = set(cache_folder().glob("copy-*"))
    # A head that runs no work, and two nodes that share it.
    with running(num_workers=2, num_cpus=6) as cluster:
        killed = killed_in("train_image_tower", cluster, words)
        again = cluster.pipeline(*words)
        resumed = (*again.communicate(), again.returncode)
    request.getfixturevalue("ray_session")  # for what looks at the run: not beside the cluster
    yield Submitted(Run(load_recipe(words)), killed, (resumed[2], resumed[0], resumed[1]))
    for copy in set(cache_folder().glob("copy-*")) - before:  # of the run's checkpoints
        shutil.rmtree(copy)


def killed_in(step: str, cluster: LocalCluster, words: list[str]) -> tuple[int, str, str]:
    """Submit a pipeline and kill its driver when `step` begins."""
    process, lines = cluster.pipeline(*words), []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.split()[:2] == [step, "running"]:
            cluster.driver().kill()
    _, errors = process.communicate()
    return process.returncode, "".join(lines), errors


@pytest.fixture(scope="session")
def tiny(submitted: Submitted) -> Run:
    """The run, complete."""
    code, output, errors = submitted.resumed
    assert code == 0, f"{output}\n{errors}"
    return submitted.run


@pytest.fixture(scope="session")
def report(tiny: Run) -> dict[str, Any]:
    return json_of(tiny, "report.json")


def content_of(uri: str) -> bytes:
    content = read_file(*filesystem(uri))
    assert content is not None, uri
    return content


def json_of(run: Run, name: str) -> JsonObject:
    loaded = read_json(f"{run.root}/{name}")
    assert loaded is not None, name
    return loaded


def times_of_parts(run: Run) -> dict[str, int]:
    """When each part file of the run's tables was written, in nanoseconds."""
    fs, path = filesystem(run.root)
    files = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return {file.path: file.mtime_ns for file in files if file.extension == "parquet"}


@END_TO_END
def test_a_job_whose_driver_was_killed_is_said_and_resumed_by_the_same_command(submitted: Submitted) -> None:
    code, output, errors = submitted.killed
    first = output.partition(": submitted\n")[0]
    assert code == 1, output
    assert f"error: {first} failed in train_image_tower: " in errors
    code, output, errors = submitted.resumed
    assert code == 0, f"{output}\n{errors}"
    second = f"{first.removesuffix('-1')}-2"
    assert output.startswith(f"{second}: submitted\n")
    assert output.endswith(f"{second}: succeeded\n")
    lines = [line.split()[:2] for line in output.splitlines()]
    assert ["ingest", "complete"] in lines
    assert ["evaluate", "done"] in lines


@END_TO_END
def test_every_step_leaves_complete_outputs_that_name_their_upstream(tiny: Run) -> None:
    for step in STEPS:
        if tiny.skipped(step):
            continue
        for name, output in tiny.outputs(step).items():
            manifest = output.manifest()
            assert manifest.fingerprint == tiny.fingerprint(step), name
            read = [r for r in step.reads if not tiny.is_left_out(r)]
            assert manifest.upstream == {r: tiny.fingerprint(MAKER[r]) for r in read}, name


@END_TO_END
def test_rows_add_up(tiny: Run) -> None:
    questions = tiny.table("questions").to_arrow().to_pylist()
    solutions = tiny.table("solutions").to_arrow().to_pylist()
    scores = tiny.table("scores").to_arrow().to_pylist()
    test = {q["question_id"] for q in questions if q["split"] == "test"}
    assert len(questions) == len(solutions) == 12
    scored = [s["solution_id"] for row in solutions if row["question_id"] in test for s in row["solutions"]]
    assert len(scored) == 16
    for arm in ("multimodal", "text_only", "shuffled_image"):
        assert sorted(s["solution_id"] for s in scores if s["arm"] == arm) == sorted(scored)
    steps = {s["solution_id"]: len(s["steps"]) for row in solutions for s in row["solutions"]}
    assert all(len(s["text_log_odds"]) == steps[s["solution_id"]] for s in scores)


@END_TO_END
def test_without_an_image_the_two_towers_score_like_the_text_prm(tiny: Run) -> None:
    from medmm_ray.reward_model import RewardModel

    text, both = (RewardModel.from_pretrained(f"{tiny.root}/{name}") for name in ("text_prm", "two_tower"))
    row = tiny.table("solutions").to_arrow().to_pylist()[0]
    steps = [s["steps"] for s in row["solutions"]]
    for one, other in zip(text.score("Which?", steps), both.score("Which?", steps), strict=True):
        assert one.plus_probs == pytest.approx(other.plus_probs, abs=1e-6)
        assert other.image_log_odds == [0.0] * len(other.image_log_odds)


@END_TO_END
def test_report_holds_what_is_promised(report: dict[str, Any], tiny: Run) -> None:
    for figure in (
        report["accuracy"]["one_sample"],
        report["accuracy"]["majority"]["4"],
        report["accuracy"]["oracle"]["4"],
    ):
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    for rule in ("best_of_n", "sc_rm"):
        assert set(report["accuracy"][rule]) >= {"text_only", "multimodal", "shuffled_image"}
        assert set(report["accuracy"][rule]["multimodal"]) == {"1", "2", "4"}
    assert set(report["step"]["multimodal"]) >= {"auroc", "macro_f1", "ece"}
    assert "kappa" in report["agreement"]["judge_expert"]
    assert [s["name"] for s in report["steps"]] == [s.name for s in STEPS if s.name not in ("evaluate", "tree_search")]
    dataset = json_of(tiny, "dataset_report.json")
    assert dataset["missing"] == []
    assert dataset["steps"]["solutions"] == 48
    assert [gate["passed"] for gate in dataset["gates"] if gate["name"] == "leakage"] == [True]
    curation = json_of(tiny, "curation_report.json")
    assert [gate["after"] for gate in curation["gates"]] == [12] * 9
    page = content_of(f"{tiny.root}/report.html").decode()
    assert "<svg" in page
    assert not re.search(r'(?:src|href)="https?://', page), "the page must be self-contained"


@END_TO_END
def test_a_second_run_skips_everything(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = times_of_parts(tiny)
    folders = {path.rpartition("/")[0] for path in before}
    for step in STEPS:
        for name, output in tiny.outputs(step).items():
            if isinstance(output, Table) and not tiny.skipped(step) and output.manifest().rows:
                assert output.path in folders, name
    assert pipeline.main([TINY, f"run={tiny.root}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("complete") >= len(STEPS) - 1
    assert "running" not in shown
    assert before == times_of_parts(tiny)


@END_TO_END
def test_a_served_query_answers_and_is_kept(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = [TINY, f"run={tiny.root}"]
    assert query.main(words) == 0
    first = capsys.readouterr().out
    assert "best of N" in first
    assert "majority vote" in first
    stored = json_of(tiny, "answer.json")
    assert stored["answer"]["arm"] == "multimodal"
    assert query.main(words) == 0
    assert first.endswith(capsys.readouterr().out), "the stored answer reads like the fresh one"


@END_TO_END
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    path: Path, tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDMM_RUN", tiny.root)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"])))
    notebook = nbformat.read(path, as_version=4)
    # The kernel listens on files, not on ports; a socket's path is short, and whole, as both have folders of their own.
    with TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(path.parent)}})
        client.execute()
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))


@END_TO_END
def test_a_run_in_an_object_store_is_released_into_a_folder(tiny: Run, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    assert release.main([TINY, f"run={tiny.root}", f"to={folder}"]) == 0
    card = (folder / "dataset" / "README.md").read_text()
    assert "12 questions with " in card
    assert "No: all cases are drawn, and speak of no person." in card
    assert (folder / "model" / "fusion.safetensors").stat().st_size > 0
    assert len(list((folder / "model" / "figures").glob("*.svg"))) == 6


@END_TO_END
def test_a_beam_search_stands_beside_the_samples(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert beam_search.main([TINY, f"run={tiny.root}", "num_questions=3", "num_beams=2", "num_expansions=2"]) == 0
    assert "best of N, equal tokens" in capsys.readouterr().out
    report = json_of(tiny, "beam_search.json")
    assert (report["questions"], report["failed"], report["guide"]) == (3, {}, tiny.model_id("two_tower"))
    search, drawn = report["figures"]["beam search"], report["figures"]["majority, all samples"]
    assert 0 <= search["low"] <= search["value"] <= search["high"] <= 1
    assert search["tokens"] > 0
    assert (drawn["samples"], drawn["tokens"] > 0) == (4, True)


@END_TO_END
def test_trees_stand_beside_the_samples_and_train_another_checkpoint_where_the_recipe_asks(tiny: Run) -> None:
    base = f"{tiny.root}/policy"
    words = [
        TINY, f"run={tiny.root}", "without=[]", "train_text_prm.label_policy=tree_search", f"train_text_prm.base={base}"
    ]  # fmt: skip
    assert pipeline.main([*words, "--from", "tree_search", "--until", "train_text_prm"]) == 0
    run = Run(load_recipe(words))
    trees, solutions, labels = (run.table(n).to_arrow() for n in ("trees", "tree_solutions", "tree_labels"))
    train = {q["question_id"] for q in run.table("questions").to_arrow().to_pylist() if q["split"] == "train"}
    assert set(trees["question_id"].to_pylist()) == set(solutions["question_id"].to_pylist()) == train
    made = {s["solution_id"]: len(s["steps"]) for row in solutions.to_pylist() for s in row["solutions"]}
    assert {label["solution_id"]: len(label["steps"]) for label in labels.to_pylist()} == made
    assert run.fingerprint(BY_NAME["sample"]) == tiny.fingerprint(BY_NAME["sample"])
    assert run.fingerprint(BY_NAME["train_text_prm"]) != tiny.fingerprint(BY_NAME["train_text_prm"])
    manifest = run.artifact("text_prm").manifest()
    assert manifest.upstream["tree_labels"] == run.fingerprint(BY_NAME["tree_search"])
    assert manifest.config["base"] == tiny.uri("policy")
    weights, other = (content_of(f"{each.uri('text_prm')}/model.safetensors") for each in (run, tiny))
    assert weights != other


@END_TO_END
def test_what_a_policy_behind_an_api_writes_is_judged_and_trained_on(tiny: Run) -> None:
    texts = [f"Step 1: Look.\nStep 2: It is dark.\nStep 3: So the answer is ({letter})." for letter in "AB" * 24]
    with serving() as server:
        server.script = [chat_said(text) for text in ("reached", *texts)]
        words = [
            TINY, f"run={tiny.root}", "models.policy=gpt-4o", "sample.engine.kind=openai",
            "apis.gpt-4o.key_variable=PATH", f"apis.gpt-4o.endpoint={server.address}/v1", "sample.num_documents=1",
            "without=[monte_carlo, tree_search]",
            f"train_text_prm.base={tiny.root}/policy",
        ]  # fmt: skip
        assert pipeline.main([*words, "--from", "sample", "--until", "judge"]) == 0
        assert len(server.requests) == 1 + 12 * 4, "the preflight's, and one a sample"
    run = Run(load_recipe(words))
    figures = run.table("solutions").manifest().figures
    assert (figures["samples_drawn"], figures["documents_shown"]) == (48, 12)
    assert figures["cost_usd"] == pytest.approx(48 * (1000 * 2.5 + 100 * 10.0) / 1e6)
    rows = run.table("solutions").to_arrow().to_pylist()
    assert {row["policy"] for row in rows} == {"gpt-4o"}
    labels = run.table("judge_labels").to_arrow(["solution_id", "error"]).to_pylist()
    assert {label["solution_id"] for label in labels} == {s["solution_id"] for row in rows for s in row["solutions"]}
    assert {label["error"] for label in labels} == {None}
    # A reward model of it starts from the checkpoint that the recipe names, as no API's model can.
    stage = BY_NAME["train_text_prm"]
    assert (run.upstream(stage)["policy"], run.section(stage).base) == ("gpt-4o", tiny.uri("policy"))


def test_the_closing_reads_a_run_wherever_it_lies(tmp_path: Path) -> None:
    usage = b'{"seconds": 120.0, "core_minutes": 3.5, "peak_pss_gib": 1.2}'
    for root in (f"{tmp_path}/run", f"file://{tmp_path}/other", f"memory://{tmp_path.name}"):
        run, log = Run(load_recipe([TINY, f"run={root}"])), Console(width=400, record=True)  # no path is cut
        fs, path = filesystem(f"{root}/usage.json")
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        write_file(fs, path, usage)
        pipeline.print_summary(run, STEPS, log, 7.0)
        shown = log.export_text()
        assert "7 s now; the last working session: 2.0 min, 3.5 core-minutes, at most 1.2 GiB (PSS)" in shown
        assert run.uri("two_tower") in shown.replace("\n", "")


def test_range_of_steps() -> None:
    assert [s.name for s in steps_between("sample", "monte_carlo")] == ["sample", "judge", "monte_carlo"]
    assert steps_between(None, None) == list(STEPS)
    with pytest.raises(ConfigError, match="unknown step 'smaple'; the steps are ingest, "):
        steps_between("smaple", None)
    with pytest.raises(ConfigError, match="--from score comes after --until sample"):
        steps_between("score", "sample")


def test_board_shows_steps_on_a_screen_and_lines_elsewhere(tmp_path: Path) -> None:
    run = Run(load_recipe([TINY, f"run={tmp_path}"]))
    screen = Console(force_terminal=True, width=140, record=True)
    board = pipeline.Board(run, STEPS[:2], screen)
    board.fail(STEPS[1], "failed")
    screen.print(board.render())
    assert re.search(r"ingest +read the source +waiting", screen.export_text())
    log = Console(width=120, record=True, force_terminal=False)
    board = pipeline.Board(run, STEPS[:2], log)
    board.skip(STEPS[0])
    assert "left out" in log.export_text()


def test_board_shows_the_notes_of_a_step_when_it_is_done_and_nothing_of_one_that_was_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    step, log = BY_NAME["sample"], Console(width=120, record=True, force_terminal=False)
    board = pipeline.Board(run, [step], log)
    job = Job(run, step)
    board.start(step, job)
    job.note("8 samples drawn for 8 [none refused], 97.5% of cacheable tokens cached")
    board.finish(step, "done")
    board.finish(step, "complete")
    shown = log.export_text().splitlines()
    assert [line.split()[:2] for line in shown] == [["sample", "running"], ["sample", "done"], ["sample:", "8"],
                                                    ["sample", "complete"]]  # fmt: skip
    assert shown[2] == "  sample: 8 samples drawn for 8 [none refused], 97.5% of cacheable tokens cached"
