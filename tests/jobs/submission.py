"""Submission of a pipeline, by Ray's own client to a Jobs API that only writes jobs down."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobDetails
from rich.console import Console

from jobs import submit
from jobs.benches.model_server import in_thread
from jobs.graph import BY_NAME
from jobs.pipeline import Board
from jobs.step import Job, Run, load_recipe
from tests.doubles.jobs_api import JobsApi

RECIPE = "jobs/recipes/tiny.yaml"
RUN = "run=s3://bucket/run"
FAILED = """Runtime env is setting up.
ingest            done                 12 rows       1.0 s
sample            running
sample                  30 s  rows of solutions: 3 of 12
sample            failed
error: the policy's context is 512 tokens, and the prompt of q1 has 600
"""


@pytest.fixture(autouse=True)
def _without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no token of the user's own
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    for name in (*submit.ADDRESSES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with in_thread(JobsApi()) as served:
        yield served


def run(api: JobsApi, *words: str) -> int:
    return submit.main([RECIPE, RUN, "--address", api.address, *words])


def test_a_job_is_submitted_under_a_name_that_comes_from_its_run_and_recipe(
    api: JobsApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # by which Ray would pass over --address
    api.log_of_new_jobs = "ingest            done\n"
    words = ("sample.num_samples_test=2", "--until", "judge", "driver.memory_gib=3")
    assert run(api, *words, "driver.label_selector={ray.io/market-type: on-demand}") == 0
    assert api.submitted["entrypoint"] == (
        f"python -m jobs.pipeline {RECIPE} {RUN} sample.num_samples_test=2 driver.memory_gib=3 "
        "'driver.label_selector={ray.io/market-type: on-demand}' --until judge"
    )
    assert api.submitted["entrypoint_num_cpus"] == 1.0
    assert api.submitted["entrypoint_memory"] == 3 << 30
    assert api.submitted["entrypoint_label_selector"] == {"ray.io/market-type": "on-demand"}
    assert api.submitted["runtime_env"]["working_dir"].startswith("gcs://")
    (first,) = api.jobs
    assert first.endswith("-1")
    assert capsys.readouterr().out == f"{first}: submitted\ningest            done\n{first}: succeeded\n"
    # How a run is executed does not make it another one; what it makes, and where, does.
    assert run(api, *words, "sample.engine.num_actors=3") == 0
    assert list(api.jobs) == [first, f"{first[:-1]}2"]
    for difference in (["seed=3"], ["--until", "sample"], ["run=s3://bucket/other"]):
        assert run(api, *words, *difference) == 0
    assert len({job.rpartition("-")[0] for job in api.jobs}) == 4


def test_a_failed_job_ends_the_command_with_one_sentence_and_is_tried_again(
    api: JobsApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.log_of_new_jobs = FAILED
    api.end_of_new_jobs = ("FAILED", "Job entrypoint command failed with exit code 1, last available logs (trunc")
    assert run(api) == 1
    (job,) = api.jobs
    shown = capsys.readouterr()
    assert shown.out == f"{job}: submitted\n{FAILED}"
    assert shown.err == (
        f"error: {job} failed in sample: the policy's context is 512 tokens, and the prompt of q1 has 600; its log: "
        f"ray job logs --address {api.address} {job}; the same command again goes on from there\n"
    )
    assert run(api, "--status") == 1
    assert capsys.readouterr().err == shown.err
    # A driver that is killed writes no last line.
    api.log_of_new_jobs = "sample            running\n"
    assert run(api) == 1
    assert "2 failed in sample: Job entrypoint command failed with exit code 1; its log" in capsys.readouterr().err


def test_a_job_that_runs_is_followed_shown_and_stopped(
    api: JobsApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "follow", _interrupt)
        api.end_of_new_jobs = ("RUNNING", "Job is currently running.")
        api.log_of_new_jobs = "ingest            done\nsample            running\n"
        assert run(api) == 130
    (job,) = api.jobs
    assert f"{job} goes on: the same command follows it again" in capsys.readouterr().err
    assert run(api, "--status") == 0
    assert f"{job}: running since 1970-01-01 " in (shown := capsys.readouterr().out)
    assert shown.endswith(", in sample\n")
    follow = submit.follow
    monkeypatch.setattr(submit, "follow", lambda *a: (api.jobs[job].update(status="SUCCEEDED"), follow(*a))[1])
    assert run(api) == 0
    assert capsys.readouterr().out.startswith(f"{job}: runs already, and is followed\ningest ")
    api.jobs[job]["status"] = "RUNNING"
    assert run(api, "--stop") == 0
    assert capsys.readouterr().out.startswith(f"{job}: stopped; the same command without --stop goes on")
    assert list(api.jobs) == [job]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_of_two_submissions_at_a_time_the_later_follows_the_earlier(
    api: JobsApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.is_overtaken = True
    assert run(api) == 0
    (job,) = api.jobs
    assert capsys.readouterr().out == f"{job}: runs already, and is followed\n{job}: succeeded\n"


def test_a_log_goes_on_where_its_connection_broke(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.log_of_new_jobs, api.breaks_first_tail_after = FAILED, len(FAILED) // 2
    api.end_of_new_jobs = ("RUNNING", "")

    def end_at_second_look(job_id: str) -> JobDetails:
        if api.num_tails > 1:
            api.jobs[job_id]["status"] = "SUCCEEDED"
        return look(job_id)

    with submit.connected(api.address) as client:
        look = client.get_job_info
        client.get_job_info = end_at_second_look  # type: ignore[method-assign]
        job_id, _ = submit.submit(client, submit.Submission("medmm-x", "true", load_recipe([RECIPE]).driver))
        _, log = submit.follow(client, job_id)
    assert capsys.readouterr().out == FAILED
    assert (log.steps, log.fault[:10]) == (["sample"], "the policy")


def test_a_log_is_read_as_the_pipeline_writes_it(tmp_path: Path) -> None:
    console, run = Console(width=120, record=True, force_terminal=False), Run(load_recipe([RECIPE, f"run={tmp_path}"]))
    steps = [BY_NAME[name] for name in ("curate", "sample", "judge")]
    board, log = Board(run, steps, console), submit.JobLog()
    board.skip(steps[0])
    board.start(steps[1], Job(run, steps[1]))
    board.start(steps[2], Job(run, steps[2]))  # beside it
    log.read(console.export_text())
    assert log.place == "in sample and judge"
    board.fail(steps[2], "failed")
    log.read(console.export_text())
    assert log.place == "in judge"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([RECIPE, "run=runs/mine"], "run=runs/mine is no place that the cluster's machines reach"),
        ([RECIPE], "run=runs/tiny is no place"),
        (["{folder}/other.yaml", RUN], "other.yaml is not uploaded, only"),
        ([RECIPE, RUN, "--until", "smaple"], "unknown step 'smaple'"),
        ([RECIPE, RUN, "sample.num_sampels=3"], "num_sampels"),
        ([RECIPE, RUN], "--address=(not set) is not the address"),
        ([RECIPE, RUN, "--address", "127.0.0.1:8265"], "--address=127.0.0.1:8265 is not the address"),
    ],
)
def test_what_could_not_run_there_is_not_submitted(
    words: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text(f"extends: {Path(RECIPE).absolute()}\n")
    assert submit.main([word.format(folder=tmp_path) for word in words]) == 2
    assert fault in capsys.readouterr().err


def test_a_cluster_that_cannot_be_used_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert submit.main([RECIPE, RUN, "--address", address]) == 2
    assert f"no Ray cluster answers at {address} (Failed to connect" in capsys.readouterr().err
    with in_thread(JobsApi(version="2.9.3")) as other:
        assert run(other) == 2
    assert f"the cluster at {other.address} runs Ray 2.9.3, and this code Ray 2.60.0" in capsys.readouterr().err


def test_a_cluster_is_shown_the_token_that_the_environment_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with in_thread(JobsApi(token="a" * 64)) as api:
        assert run(api) == 2
        assert f"{api.address} asks for a token, and this shell has none; export" in capsys.readouterr().err
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        assert run(api) == 2
        assert "token is no file with a token" in capsys.readouterr().err
        (tmp_path / "token").write_text("b" * 64)
        assert run(api) == 2
        assert f"{api.address} refuses this shell's token" in capsys.readouterr().err
        (tmp_path / "token").write_text("a" * 64)
        assert run(api) == 0
        (job,) = api.jobs
        assert run(api, "--status") == 0
        assert f"{job}: succeeded" in capsys.readouterr().out
    assert run(api, "--status") == 2
