"""Steps on scripted engines, to be interrupted: ``python -m jobs.benches.scripted recipe.yaml name=value ...``.

What a step requests of vLLM or of an encoder comes from a script: the same words for the same prompt and seed, after
a pause (``PAUSE_S`` seconds in the environment) in which it can be killed. Ray, Ray Data, tables and processes are
real. Runs all steps up to ``UNTIL`` in one session, as a pipeline does, and says of each when it begins and ends:
``begin sample``.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.entry import guarded
from jobs.graph import STEPS, Step
from jobs.overlap import run_steps
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import digest
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling, Statistics
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.session import session
from medmm_ray.steps.embed import EmbedConfig, document_passages, embed_images, question_queries
from medmm_ray.text import numbered_steps, step_mark

if TYPE_CHECKING:
    from PIL.Image import Image
    from ray.data import Dataset

WIDTH = 16  # of a scripted vector


class ScriptedGenerator:
    """A policy; a prompt's tokens are its characters."""

    def __init__(self, model: str, config: VllmEngine, pause_s: float) -> None:  # noqa: ARG002
        self.pause_s = pause_s
        self.statistics = Statistics()

    def count(self, prompt: ChatPrompt) -> int:
        """A prompt's characters."""
        return len(_text_of(prompt))

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """`n` scripted solutions, or what follows the prompt's prefix in them, after the pause."""
        await asyncio.sleep(self.pause_s)
        prompt_text, num_marks = _text_of(prompt), prompt.prefix.count("Step ")
        samples: list[Completion] = []
        for sample_seed in range(seed, seed + n):
            text = cut(solution(prompt_text, num_marks, sample_seed), sampling.stop)
            samples.append(Completion(text, "stop", sample_seed, len(text)))
        return samples


class ScriptedEncoder:
    """A direction for each text or image, by its content alone."""

    max_tokens = 256
    identity = document_identity = query_identity = None

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def encode(self, items: "Sequence[str] | NDArray[np.float32]") -> NDArray[np.float32]:
        """Unit vectors of texts or pixels_N3HW, after the pause."""
        time.sleep(self.pause_s)
        vectors: list[NDArray[np.float64]] = []
        for item in items:
            content = item if isinstance(item, str) else item.tobytes().hex()
            rng = np.random.default_rng(int(digest(content), 16))
            vectors.append(rng.standard_normal(WIDTH))
        vectors_ND = np.array(vectors, np.float32).reshape(-1, WIDTH)
        unit_ND: NDArray[np.float32] = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return unit_ND

    def count(self, texts: Sequence[str]) -> list[int]:
        """Words of each text."""
        return [len(text.split()) for text in texts]

    def encode_documents(self, titles: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of titles and texts."""
        return self.encode([f"{title}\n{text}" for title, text in zip(titles, texts, strict=True)])

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of queries."""
        return self.encode(texts)


def pixels_of(image: "Image") -> NDArray[np.float32]:
    """A picture as pixels_3HW, H and W the same for all."""
    return np.asarray(image.resize((WIDTH, WIDTH)), np.float32).transpose(2, 0, 1)


def load_pixels_of(_model: str) -> "Callable[[Image], NDArray[np.float32]]":
    """`pixels_of`, whatever the model."""
    return pixels_of


def load_scripted_encoder(_model: str, _device: str, pause_s: float) -> ScriptedEncoder:
    """The scripted encoder, whatever the model."""
    return ScriptedEncoder(pause_s)


def _text_of(prompt: ChatPrompt) -> str:
    """The last message and the prefix after it."""
    return prompt.messages[-1]["content"] + prompt.prefix


def solution(prompt_text: str, num_marks: int, seed: int) -> str:
    """A solution of three steps, or what follows the last of its first `num_marks` marks; it ends with an answer."""
    number = int(digest(prompt_text, seed), 16)
    steps = [
        f"Look at the heart ({number % 7}).",
        f"It is wide ({number % 5}).",
        f"The answer is ({'ABCD'[number % 4]}).",
    ]
    first = max(num_marks, 1)
    remaining = steps[min(first, len(steps)) - 1 :]
    text = "\n".join(numbered_steps(remaining, first))
    return text.removeprefix(step_mark(num_marks))


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` as far as the first of the stops, which stays."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


class Embedder:
    """The actor of the scripted encoder, in place of those that load a tower."""

    def __init__(self, vectors: Callable[[pa.Table], pa.Table]) -> None:
        self.vectors = vectors

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.vectors(batch)


def _embed(
    ds: "Dataset",
    config: EmbedConfig,
    image_tower: str,  # noqa: ARG001
    vectors: Callable[[pa.Table], pa.Table],
) -> "Dataset":
    from ray.data import ActorPoolStrategy

    return ds.map_batches(
        Embedder,
        fn_constructor_args=(vectors,),
        batch_size=config.text_batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_cpus=config.num_cpus,
    )


def use_scripted_engines(pause_s: float) -> None:
    """Give the jobs of this process scripted engines in place of their own."""
    for name in ("sample", "monte_carlo", "tree_search"):
        job = import_module(f"jobs.{name}")
        setattr(job, name, partial(getattr(job, name), generator=partial(ScriptedGenerator, pause_s=pause_s)))
    load_encoder = partial(load_scripted_encoder, pause_s=pause_s)
    scripted_images = partial(embed_images, load_preprocess=load_pixels_of, load_encoder=load_encoder)
    setattr(import_module("jobs.embed"), "embed_images", scripted_images)  # noqa: B010
    encoder = ScriptedEncoder(pause_s)
    for name, vectors in (
        ("embed_documents", partial(document_passages, encoder=encoder, config=EmbedConfig())),
        ("embed_questions", partial(question_queries, encoder=encoder)),
    ):
        setattr(import_module("jobs.embed"), name, partial(_embed, vectors=vectors))


class Announcer:
    """Prints when steps begin and end."""

    def start(self, step: Step, job: Job) -> None:  # noqa: ARG002
        """Print that a step begins."""
        print(f"begin {step.name}", flush=True)

    def finish(self, step: Step, state: str) -> None:  # noqa: ARG002
        """Print that a step has ended."""
        print(f"end {step.name}", flush=True)

    def fail(self, step: Step, state: str) -> None:
        """Print that a step has failed."""
        print(f"{state} {step.name}", flush=True)


def work(words: Sequence[str]) -> int:
    """Run the steps up to ``UNTIL``, those that are not complete; the exit status."""
    run = Run(load_recipe(words))
    last = [step.name for step in STEPS].index(os.environ["UNTIL"])
    use_scripted_engines(float(os.environ["PAUSE_S"]))
    steps = [step for step in STEPS[: last + 1] if not run.skipped(step) and not run.is_complete(step)]
    with session():
        for _ in run_steps(run, steps, Announcer()):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: work(sys.argv[1:])))
