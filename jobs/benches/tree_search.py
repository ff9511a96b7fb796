"""Tree search: many trees at once on one vLLM engine, against MedS3's own order on it, one request after another.

The policy is a small Llama that a minute of training taught the form of phantom solutions. All sides must grow the same
trees.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console

from jobs.benches import Measured
from jobs.benches.policy import phantom_questions, train_toy_policy
from medmm_ray.config import Config
from medmm_ray.data import records
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Generator, Sampling, TextGenerator
from medmm_ray.steps.tree_search import TreeSearchActor, TreeSearchConfig
from medmm_ray.steps.tree_search.writer import StepWriterEngine
from medmm_ray.train.policy import LlamaShape, PolicyConfig


class BenchConfig(Config):
    """How many trees, of which policy."""

    questions: int = 64
    """Trees that grow at once."""
    alone: int = 4
    """How many of them, the first, are also grown one at a time."""
    policy: PolicyConfig = PolicyConfig(
        shape=LlamaShape(hidden_size=128, num_layers=2, vocab_size=512),
        epochs=16,
        batch_size=16,
        learning_rate=2e-3,
        trackers=(),
    )
    """The policy and its training."""
    threads: int = 2
    """OpenMP threads of the engine."""
    seed: int = 0
    """Start of all random numbers, of the questions and the trees."""


class OneRequest:
    """An engine that is asked for one thing at a time: a node's next steps, then each child's rollouts."""

    def __init__(self, generator: TextGenerator) -> None:
        self.generator, self.statistics = generator, generator.statistics
        self.turn = asyncio.Semaphore(1)

    def count(self, prompt: ChatPrompt) -> int:
        """As the engine counts."""
        return self.generator.count(prompt)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """The engine's samples, once no other request is under way."""
        async with self.turn:
            return await self.generator.generate(prompt, n, seed, sampling)


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Trees per second of each side, and what the trees hold."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        policy = train_toy_policy(f"{folder}/policy", config.policy)
        console.print(f"[dim]policy trained in {time.perf_counter() - started:.0f} s[/dim]")
        trees, seconds = asyncio.run(_sides(config, policy))
    ours, one_tree, one_request = len(trees) / seconds[0], config.alone / seconds[1], config.alone / seconds[2]
    yield Measured(
        "trees at once against one tree, one request at a time", one_request, ours, ours / one_request, "≥ 5", "trees/s"
    )
    yield Measured(
        "trees at once against one tree, its rollouts side by side", one_tree, ours, ours / one_tree, "", "trees/s"
    )
    tokens = [tree.num_tokens / seconds[0] for tree in trees]
    alone = sum(tokens[: config.alone]) * seconds[0] / seconds[2]
    yield Measured("tokens drawn", alone, sum(tokens), sum(tokens) / alone, "", "tokens/s")
    nodes = sum(len(tree.nodes) for tree in trees) / len(trees)
    yield Measured("nodes a tree", nodes, nodes, 1.0, "", "nodes")


async def _sides(config: BenchConfig, policy: str) -> tuple[list[records.Tree], list[float]]:
    """The trees, and the seconds of ours, of one tree and of one request at a time, on one engine.

    Ours comes first: the others find their prompts cached.
    """
    settings = TreeSearchConfig(
        engine=StepWriterEngine(dtype="float32", max_model_len=512, num_threads=config.threads),
        max_tokens=96,
        temperature=1.0,
        top_p=1.0,
        reflect=False,
        seed=config.seed,
    )
    engine = Generator(policy, settings.engine)
    one_request = OneRequest(engine)
    concurrent = TreeSearchActor(settings, policy, "toy", "bench", lambda *_: engine)
    sequential = TreeSearchActor(settings, policy, "toy", "bench", lambda *_: one_request)
    rows = [asdict(question) for question in phantom_questions(config.questions, config.seed)]
    try:
        await concurrent.search(rows[0] | {"question_id": "warm"})
        marks = [time.perf_counter()]
        trees = await asyncio.gather(*map(concurrent.search, rows))
        marks.append(time.perf_counter())
        for actor in (concurrent, sequential):
            alone = [await actor.search(row) for row in rows[: config.alone]]
            marks.append(time.perf_counter())
            _same(alone, trees)
    finally:
        engine.shutdown()
    return trees, [after - before for before, after in itertools.pairwise(marks)]


def _same(alone: Sequence[records.Tree], trees: Sequence[records.Tree]) -> None:
    for tree, concurrent_tree in zip(alone, trees, strict=False):
        if tree != concurrent_tree:
            raise AssertionError(f"the tree of {tree.question_id} is another when it grows alone")
