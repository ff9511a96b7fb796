"""The judge against a local server with 200 ms latency and 5 % faults: concurrency, lost rows, answers paid twice.

The server is a process of its own (`judge_server`) and counts what reaches it; the judge is the real step in a Ray Data
job. Its mean in-flight is taken from the first new request to the last one, while there is something to send; beside it
stands what loops reach on this machine that do nothing but ask. For the kill, the driver with all its workers gets
SIGKILL at a random moment and is started again when they are gone: what the server had handed over whole may be asked
again only where it was in flight at that moment. Faults: 429 with Retry-After, 500, cut connections, garbled bodies,
and answers that do not fit.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.fault_injection import await_workers_end
from jobs.benches.judge_server import verdict
from medmm_ray.config import Config, build, execution
from medmm_ray.data.records import Image, Labels, Question, Solution, Solutions, to_arrow
from medmm_ray.data.tables import Provenance, Table, pending
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.steps.judge import JudgeConfig, judge

MODEL = "bench"


class BenchConfig(Config):
    """How much is judged, by what."""

    questions: int = 200
    """Questions, each with an image; the default is a minute of calls, so that Ray's start weighs little."""
    solutions: int = 24
    """Solutions per question."""
    steps: int = 6
    """Steps per solution."""
    in_flight: int = 16
    """Requests at a time."""
    latency_s: float = 0.2
    """Seconds that the server takes for an answer."""
    fault_rate: float = Field(0.05, ge=0, le=1)
    """Share of requests that meet a fault."""
    per_call: tuple[int, ...] = (2, 4, 8)
    """Values of solutions_per_call whose cost is compared with 1's."""
    kills: int = Field(1, ge=0)
    """Times that everything is killed in the run that is for it."""
    seed: int = execution(0)
    """Start of the faults and of the moments of the kills."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Concurrency, lost rows and answers paid twice, undisturbed and killed; then the cost of shared calls."""
    with tempfile.TemporaryDirectory() as folder, server(config) as address:
        path = Path(folder)
        write_tables(path, config)
        asyncio.run(bare_callers(address, config))
        bare = server_report(address)["in_flight"]
        name = "mean in-flight of as many bare callers / configured"
        yield Measured(name, config.in_flight, bare, bare / config.in_flight, "", "requests")
        reset_report(address)
        yield from _undisturbed(path, address, config, console)
        if config.kills:
            yield from _killed(path, address, config, console)
        yield from _shared_calls(path, address, config, console)


async def bare_callers(address: str, config: BenchConfig, calls: int = 800) -> None:
    """Ask as fast as this machine and this server allow: `in_flight` loops that do nothing else, with as much text."""
    numbers = iter(range(calls))

    async def ask(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            content = f"{number} " * 2000
            messages = [{"role": "system", "content": content}, {"role": "user", "content": content}]
            body = {"model": "", "messages": messages}
            with suppress(aiohttp.ClientError):  # a fault that is meant
                async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                    await response.read()

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(ask(session) for _ in range(config.in_flight)))


def _undisturbed(path: Path, address: str, config: BenchConfig, console: Console) -> Iterator[Measured]:
    start(path, "undisturbed", address, config).wait()
    report = server_report(address)
    console.print(f"undisturbed: {report}")
    limit, in_flight, later = config.in_flight, report["in_flight"], report["in_flight_later"]
    name = "mean in-flight at the server / configured"
    yield Measured(name, limit, in_flight, in_flight / limit, "≥ 0.95", "requests")
    yield Measured("the same without the first five seconds", limit, later, later / limit, "", "requests")
    yield from _label_rows(path, "undisturbed", config)
    twice = report["twice"]
    yield Measured("whole answers paid twice", report["delivered"], twice, twice, "≤ 0", "answers")
    yield from _cost_rows(path, "undisturbed", report)
    prompt, cached = report["tokens"]["prompt"], report["tokens"]["cached"]
    yield Measured("prompt tokens that the provider had cached", prompt, cached, cached / prompt, "", "tokens")


def _killed(path: Path, address: str, config: BenchConfig, console: Console) -> Iterator[Measured]:
    reset_report(address)
    rng, in_flight = random.Random(config.seed), config.kills * config.in_flight
    calls = config.questions * config.solutions
    for _ in range(config.kills):
        process = start(path, "killed", address, config)
        arrivals_at_kill = server_report(address)["arrivals"] + rng.uniform(0.05, 0.8) / config.kills * calls
        while process.poll() is None and server_report(address)["arrivals"] < arrivals_at_kill:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        await_workers_end(process.pid)
    start(path, "killed", address, config).wait()
    report = server_report(address)
    console.print(f"killed {config.kills} times: {report}")
    name, twice = "killed -9: whole answers paid twice / in flight", report["twice"]
    yield Measured(name, in_flight, twice, twice / in_flight, "≤ 1", "answers")
    lost = close_ledger(f"{path}/killed-api/{MODEL}").lost_calls
    unfinished = report["faults"].get("cut", 0) + report["faults"].get("garbled", 0) + in_flight
    name = "killed -9: calls booked as possibly paid / cut off or in flight"
    yield Measured(name, unfinished, lost, lost / unfinished, "≤ 1", "calls")
    yield from _label_rows(path, "killed", config, "killed -9: ")
    yield from _cost_rows(path, "killed", report, "killed -9: ")


def _shared_calls(path: Path, address: str, config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Tokens as list prices weigh them: cached ones a quarter, completion tokens four times a prompt token.

    What sharing does to κ cannot be measured here: this judge's verdicts do not depend on what else is in its prompt.
    """
    base_cost = 0.0
    for per_call in (1, *config.per_call):
        reset_report(address)
        start(path, f"per_call_{per_call}", address, config, solutions_per_call=per_call).wait()
        tokens = server_report(address)["tokens"]
        cost = tokens["prompt"] - 0.75 * tokens["cached"] + 4 * tokens["completion"]
        cost /= config.questions * config.solutions * config.steps
        console.print(f"solutions_per_call={per_call}: {tokens}")
        base_cost = base_cost or cost
        if per_call > 1:
            name = f"cost of a step, solutions_per_call={per_call} / 1"
            yield Measured(name, base_cost, cost, cost / base_cost, "", "tokens, weighted")


def _label_rows(path: Path, name: str, config: BenchConfig, prefix: str = "") -> Iterator[Measured]:
    """Rows that have the verdicts which the server gave on their own steps, or an error that names why not."""
    verdicts: dict[str, list[bool]] = {}
    for row in _solutions(path):
        for solution in row["solutions"]:
            verdicts[solution["solution_id"]] = [verdict(step) for step in solution["steps"]]
    rows = Table(str(path / name), Labels).to_arrow().to_pylist()
    num_good = num_errors = 0
    for row in rows:
        labels = [step["label"] for step in row["steps"]]
        num_good += bool(row["error"]) or labels == verdicts[row["solution_id"]]
        num_errors += row["error"] is not None
    expected = config.questions * config.solutions
    num_doubled = len(rows) - len(verdicts)
    yield Measured(f"{prefix}rows labelled or named", expected, num_good, num_good / expected, "≥ 1", "rows")
    yield Measured(f"{prefix}of them named", expected, num_errors, num_errors / expected, "", "rows")
    yield Measured(f"{prefix}rows doubled", expected, num_doubled, num_doubled, "≤ 0", "rows")


def _cost_rows(path: Path, name: str, report: Mapping[str, Any], prefix: str = "") -> Iterator[Measured]:
    """The ledger beside the provider's bill, which counts what was cut off and garbled too."""
    bill = (report["tokens"]["prompt"] + report["tokens"]["completion"]) / 1e6  # a dollar per million, of either
    ledger = close_ledger(f"{path}/{name}-api/{MODEL}")
    booked = ledger.spent + ledger.possibly_paid
    share = round(booked / bill, 9)  # sums of the same prices in another order differ in their last digit
    yield Measured(f"{prefix}booked as spent or possibly paid / bill", bill, booked, share, "≥ 1", "dollars")


# What is judged


def write_tables(path: Path, config: BenchConfig) -> None:
    """Write phantoms with solutions whose steps are all different."""
    from medmm_ray.data.sources.phantom.questions import make_questions
    from medmm_ray.data.sources.phantom.render import render

    questions, images, solutions = [], [], []
    for number, item in enumerate(make_questions(config.seed, "train", config.questions)):
        name = f"{number:05d}"
        render(item.case, 128).save(path / f"{name}.png")
        image = Image(
            image_id=name,
            uri=str(path / f"{name}.png"),
            sha256=name,
            perceptual_hash="",
            width=128,
            height=128,
            split="train",
            modality="radiology",
            diagnosis="",
            annotation="",
        )
        question = Question(
            question_id=f"q{name}",
            source="phantom",
            split="train",
            modality="radiology",
            difficulty="easy",
            question=f"{number}: {item.question} " + "The guideline says that fluid blunts the angle. " * 40,
            options=list(item.options),
            answer=item.answer,
            answer_type="choice",
            image_ids=[name],
        )
        row = Solutions(
            question_id=f"q{name}",
            policy="bench",
            config_hash="",
            num_requested=config.solutions,
            solutions=[_solution(name, index, config.steps) for index in range(config.solutions)],
        )
        images.append(image)
        questions.append(question)
        solutions.append(row)
    _write(path / "questions", Question, questions)
    _write(path / "images", Image, images)
    _write(path / "solutions", Solutions, solutions)


def _solution(question: str, index: int, num_steps: int) -> Solution:
    steps = [f"Of question {question}, solution {index}: observation {step} is so." for step in range(1, num_steps + 1)]
    return Solution(
        solution_id=f"s{question}-{index}",
        index=index,
        text="",
        steps=steps,
        answer="A",
        correct=True,
        finish_reason="stop",
        seed=0,
        text_sha=f"{question} {index}",
    )


def _write(path: Path, record: type, rows: list[Any]) -> None:
    table = Table(str(path), record)
    table.prepare()
    key = record.key[0]  # type: ignore[attr-defined]
    for first in range(0, len(rows), 8):
        table.write_part(to_arrow(record, rows[first : first + 8]), key)
    table.finish(_origin(path.name), key, [row.__dict__[key] for row in rows], 0.0)


def _origin(name: str) -> Provenance:
    return Provenance(name=name, fingerprint=name, config={}, upstream={})


def _solutions(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Table(str(path / "solutions"), Solutions).to_arrow().to_pylist()
    return rows


# One judging, as a process that can be killed


def start(path: Path, name: str, address: str, config: BenchConfig, **settings: Any) -> "subprocess.Popen[bytes]":
    """Start judging `path` into the table `name`, or what is left of it, in a process group of its own."""
    engine = {"kind": "openai", "model": MODEL, "batch_size": 1, "max_concurrency": 8}
    judging = {
        "judge": {"engine": engine, **settings},
        "api": {
            "endpoint": f"{address}/v1",
            "in_flight": config.in_flight,
            "input_price": 1.0,
            "output_price": 1.0,
        },
    }
    words = [sys.executable, "-m", "jobs.benches.judge", str(path), name, json.dumps(judging)]
    return subprocess.Popen(words, env={**os.environ, "OPENAI_API_KEY": "none"}, start_new_session=True)


class Judging(Config):
    """What the process that judges is started with."""

    judge: JudgeConfig
    api: ApiConfig


def run(path: Path, name: str, config: Judging) -> None:
    """Judge as ``jobs.judge`` does: what is labelled already is not asked again, the manifest is written last."""
    from medmm_ray.session import session

    table = Table(str(path / name), Labels)
    questions = Table(str(path / "questions"), Question).to_arrow()
    images = Table(str(path / "images"), Image).to_arrow()
    ids = questions["question_id"].to_pylist()
    with session():
        table.prepare()
        solutions = Table(str(path / "solutions"), Solutions).dataset(rows_per_block=8)
        source = pending(solutions, "question_id", table.done_ids())
        apis = Apis(f"{path}/{name}-api", {MODEL: config.api})
        labels = judge(source, config.judge, questions=questions, images=images, model=MODEL, apis=apis)
        if table.done_ids() != set(ids):
            table.write(labels, "question_id", "labels")
    table.finish(_origin(name), "question_id", ids, 0.0)


@contextmanager
def server(config: BenchConfig) -> Iterator[str]:
    """The chat server as a process; gives its address."""
    words = [sys.executable, "-m", "jobs.benches.judge_server", str(config.latency_s), str(config.fault_rate)]
    with subprocess.Popen([*words, str(config.seed)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def server_report(address: str) -> dict[str, Any]:
    """What the server has counted since it was reset."""
    with urllib.request.urlopen(f"{address}/report") as response:  # noqa: S310 - our own server
        report: dict[str, Any] = json.loads(response.read())
    return report


def reset_report(address: str) -> None:
    """Let the server count anew."""
    request = urllib.request.Request(f"{address}/reset", method="POST")  # noqa: S310 - our own server
    urllib.request.urlopen(request).close()  # noqa: S310


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], build(Judging, json.loads(sys.argv[3]), "bench"))
