"""A recipe's pipeline as a job of a Ray cluster: ``python -m jobs.submit recipe.yaml --address URL [name=value ...]``.

The checkout is uploaded, without what ``.gitignore`` and ``.rayignore`` name, and the job runs ``jobs.pipeline`` on the
same words there, with the cluster's own python. A job is named after its run and recipe: whoever submits it again
follows it while it runs, and starts its next try when it has ended, which makes what is missing.
"""

import argparse
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jobs
from jobs.entry import add_range, launch, parser, read_arguments
from jobs.event_loop import run_coroutine
from jobs.graph import BY_NAME, steps_between
from jobs.recipe import DriverConfig, Recipe
from medmm_ray.config import ConfigError, digest, identity
from medmm_ray.session import HAND_OVER, has_token_mode, token_of_cluster

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ROOT = Path(jobs.__file__).parent.parent  # what is uploaded
POLL_S = 1.0
PATIENCE_S = 60.0  # with a cluster that does not answer any more, and for a job to stop
# By these variables Ray passes over the address that a program names.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Loggers of Ray's that tell of every file that is not uploaded, and of every socket.
NOISY = ("ray._private.runtime_env", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
# The lines of `jobs.pipeline.Board` and the last one of `jobs.entry.guarded`.
_STEP = re.compile(rf"(?P<name>{'|'.join(BY_NAME)}) +(?P<state>running|done|complete|failed|interrupted)\b")
_FAULT = "error: "


@dataclass(frozen=True)
class Submission:
    """A command for a cluster; `name` is that of all of its tries."""

    name: str
    entrypoint: str
    driver: DriverConfig


@dataclass
class JobLog:
    """What a job's log says of where the job is: the steps in progress or the failed one, and the fault of its end."""

    num_chars: int = 0
    steps: list[str] = field(default_factory=list)
    fault: str = ""
    _unfinished_line: str = ""

    @property
    def place(self) -> str:
        """Where the job is, as words of a sentence."""
        return f"in {' and '.join(self.steps)}" if self.steps else "outside of its steps"

    def read(self, text: str) -> None:
        """Take in what the log goes on with."""
        self.num_chars += len(text)
        *lines, self._unfinished_line = (self._unfinished_line + text).split("\n")
        for line in lines:
            match = _STEP.match(line)
            if match:
                self._change(match["name"], match["state"])
            elif line.startswith(_FAULT):
                self.fault = line.removeprefix(_FAULT)

    def _change(self, step: str, state: str) -> None:
        if state in ("failed", "interrupted"):
            self.steps = [step]
        elif state == "running":
            self.steps.append(step)
        else:
            self.steps = [name for name in self.steps if name != step]


def main(words: list[str] | None = None) -> int:
    """``python -m jobs.submit``."""
    arguments = parser("submit", "All steps of a recipe as a job of a Ray cluster: followed, looked at, stopped.")
    arguments.add_argument("--address", metavar="URL", help="the cluster's dashboard, e.g. http://127.0.0.1:8265")
    arguments.add_argument("--status", action="store_true", help="only say where the job is")
    arguments.add_argument("--stop", action="store_true", help="stop the job; what it has written is kept")
    add_range(arguments)
    return launch(arguments, words, _main, Recipe)


def _main(parsed: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    submission = submission_of(parsed)
    with connected(parsed.address) as client:
        if parsed.status or parsed.stop:
            job = latest_try(client, submission)
            return _stop(client, job) if parsed.stop else _show(client, job)
        return _submit(client, submission)


# What is submitted


def submission_of(parsed: argparse.Namespace) -> Submission:
    """The job that parsed arguments ask for. Raises `ConfigError` where it could not run on another machine."""
    recipe = read_arguments(parsed, section=None)
    steps_between(parsed.first, parsed.last)
    if not ("://" in recipe.run or Path(recipe.run).is_absolute()):
        raise ConfigError(
            f"run={recipe.run or '(not set)'} is no place that the cluster's machines reach: name a URI, e.g. "
            "run=s3://bucket/mine, or the absolute path of a folder that all of them share"
        )
    path = Path(parsed.recipe).resolve()
    if not path.is_relative_to(ROOT):
        raise ConfigError(f"{path} is not uploaded, only {ROOT} is: copy the recipe there, e.g. to jobs/recipes/")
    words = ["python", "-m", "jobs.pipeline", str(path.relative_to(ROOT)), *parsed.overrides]
    for option, step in (("--from", parsed.first), ("--until", parsed.last)):
        words += [option, step] if step else []
    name = f"medmm-{digest(recipe.run.rstrip('/'), identity(recipe), parsed.first, parsed.last)}"
    return Submission(name, shlex.join(words), recipe.driver)


# The cluster


@contextmanager
def connected(address: str | None) -> Iterator["JobSubmissionClient"]:
    """A client of the cluster at `address`, with the token that the environment has for it.

    Raises `ConfigError` where no cluster answers there, it refuses the token, or it runs another version of Ray.
    """
    if not address or not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address={address or '(not set)'} is not the address of a cluster's dashboard, such as "
            "http://127.0.0.1:8265, which make cluster-up prints"
        )
    with ExitStack() as stack:
        for variable in ADDRESSES:
            if variable in os.environ:
                stack.callback(os.environ.__setitem__, variable, os.environ.pop(variable))
        stack.enter_context(token_of_cluster(address))
        yield _client(address)


def _client(address: str) -> "JobSubmissionClient":
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        refusal = "refuses this shell's token" if has_token_mode() else "asks for a token, and this shell has none"
        raise ConfigError(f"the cluster at {address} {refusal}; {HAND_OVER}") from error
    except (ConnectionError, requests.RequestException, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); is it up, and is that the address of "
            "its dashboard, or the end of a tunnel to it (ray attach --port-forward 8265, kubectl port-forward)?"
        ) from error
    version = client._server_ray_version
    if version != ray.__version__:
        raise ConfigError(
            f"the cluster at {address} runs Ray {version}, and this code Ray {ray.__version__}: use the checkout from "
            f"which its environment was built, or build its image anew (cluster/Dockerfile.*)"
        )
    return client


def tries_of(client: "JobSubmissionClient", name: str) -> list["JobDetails"]:
    """The tries of a job, the latest last."""
    tries = {}
    for job in client.list_jobs():
        prefix, _, number = (job.submission_id or "").rpartition("-")
        if prefix == name:
            tries[int(number)] = job
    return [tries[number] for number in sorted(tries)]


def latest_try(client: "JobSubmissionClient", submission: Submission) -> "JobDetails":
    """The last try of a job. Raises `ConfigError` where there is none."""
    tries = tries_of(client, submission.name)
    if not tries:
        raise ConfigError(
            f"{client.get_address()} has no job {submission.name}, of this recipe, run and range of steps; "
            "without --status and --stop it is submitted"
        )
    return tries[-1]


def submit(client: "JobSubmissionClient", submission: Submission) -> tuple[str, bool]:
    """The id of the try that runs, and whether it did so already; the next one is started where none does."""
    tries = tries_of(client, submission.name)
    if tries and not tries[-1].status.is_terminal():
        return str(tries[-1].submission_id), True
    number = int(str(tries[-1].submission_id).rpartition("-")[2]) + 1 if tries else 1
    job_id, driver = f"{submission.name}-{number}", submission.driver
    try:
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=job_id,
            runtime_env={"working_dir": str(ROOT)},
            entrypoint_num_cpus=driver.num_cpus,
            entrypoint_memory=int(driver.memory_gib * (1 << 30)),
            entrypoint_label_selector=driver.label_selector or None,
        )
    except RuntimeError:
        # A name is given once: another submission may have been faster.
        if job_id not in [job.submission_id for job in tries_of(client, submission.name)]:
            raise
        return job_id, True
    return job_id, False


# Following


def _submit(client: "JobSubmissionClient", submission: Submission) -> int:
    job_id, runs_already = submit(client, submission)
    print(f"{job_id}: {'runs already, and is followed' if runs_already else 'submitted'}", flush=True)
    try:
        job, log = follow(client, job_id)
    except KeyboardInterrupt:
        print(
            f"\n{job_id} goes on: the same command follows it again, with --status it only says where it is, with "
            "--stop it is stopped",
            file=sys.stderr,
        )
        return 130
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _end(client, job, log)


def follow(client: "JobSubmissionClient", job_id: str) -> tuple["JobDetails", JobLog]:
    """Print a job's log until it ends; a connection that breaks is made anew. Raises ConnectionError without one."""
    import aiohttp

    log = JobLog()
    _await_start(client, job_id)
    while True:
        with suppress(aiohttp.ClientError, RuntimeError):
            run_coroutine(_print_log(client, job_id, log))
        job = _details(client, job_id)
        if job.status.is_terminal():
            return job, log
        time.sleep(POLL_S)


def _await_start(client: "JobSubmissionClient", job_id: str) -> None:
    """Wait until the job's driver runs, and say once for what."""
    start_time, message = time.monotonic(), ""
    while (job := _details(client, job_id)).status == "PENDING":
        if time.monotonic() - start_time > 10 * POLL_S and job.message != message:
            message = job.message or ""
            print(f"{job_id}: {message}", flush=True)
        time.sleep(POLL_S)


async def _print_log(client: "JobSubmissionClient", job_id: str, log: JobLog) -> None:
    num_printed = log.num_chars  # the log comes from its beginning each time
    async for text in client.tail_job_logs(job_id):
        new_text = text[num_printed:]
        num_printed = max(0, num_printed - len(text))
        log.read(new_text)
        print(new_text, end="", flush=True)


def _details(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    import requests

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(job_id)
        except (requests.RequestException, RuntimeError) as error:  # the head, or the machine of the driver
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"{client.get_address()} has not answered for {PATIENCE_S:g} s; {job_id} may go on, and the same "
                    "command follows it again"
                ) from error
        time.sleep(POLL_S)


def _end(client: "JobSubmissionClient", job: "JobDetails", log: JobLog) -> int:
    """Say how a job has ended; the exit status."""
    if job.status == "SUCCEEDED":
        print(f"{job.submission_id}: succeeded")
        return 0
    print(f"error: {sentence(job, log, client.get_address())}", file=sys.stderr)
    return 1


def sentence(job: "JobDetails", log: JobLog, address: str) -> str:
    """How a job that has not succeeded ended: in which step, why, where its log is, and what to do."""
    ended = "was stopped" if job.status == "STOPPED" else "failed"
    # Ray's message has the end of the log after its first line.
    reason = log.fault or (job.message or "").partition("\n")[0].partition(", last available logs")[0]
    return (
        f"{job.submission_id} {ended} {log.place}: {reason.rstrip('.')}; its log: ray job logs --address {address} "
        f"{job.submission_id}; the same command again goes on from there"
    )


# Looking and stopping


def _show(client: "JobSubmissionClient", job: "JobDetails") -> int:
    """Say where a job is; the exit status, which is that of a job that has ended."""
    log = JobLog()
    with suppress(RuntimeError):  # no driver yet, or its machine is gone
        log.read(client.get_job_logs(str(job.submission_id)))
    if job.status.is_terminal():
        return _end(client, job, log)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
    place = log.place if log.steps else str(job.message)
    print(f"{job.submission_id}: {str(job.status).lower()} since {since}, {place}")
    return 0


def _stop(client: "JobSubmissionClient", job: "JobDetails") -> int:
    """Stop a job; the exit status."""
    job_id = str(job.submission_id)
    if not job.status.is_terminal():
        client.stop_job(job_id)
        deadline = time.monotonic() + PATIENCE_S
        while not (job := _details(client, job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                print(f"error: {job_id} has not stopped within {PATIENCE_S:g} s; ask again", file=sys.stderr)
                return 1
            time.sleep(POLL_S)
    print(f"{job_id}: {str(job.status).lower()}; the same command without --stop goes on from what is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
