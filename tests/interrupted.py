"""A step on a scripted engine, slow enough to be interrupted: ``python -m tests.interrupted recipe.yaml run=...``."""

import asyncio
import functools
import os
import sys

import jobs.sample
from jobs.graph import BY_NAME
from jobs.step import Job, Run, guarded, load_recipe, run_step
from medmm_ray.engines.generator import Completion, GeneratorConfig, Prompt, Sampling
from medmm_ray.sample import sample
from medmm_ray.session import session
from tests.fake_generator import FakeGenerator


def script(prompt: str, seed: int) -> str:
    letter = "ABCD"[(seed + len(prompt)) % 4]
    return f"Step 1: Look at the heart ({seed % 7}).\nStep 2: It is wide.\nStep 3: So the answer is ({letter})."


class SlowGenerator(FakeGenerator):
    async def generate(self, prompt: Prompt, n: int, seed: int, how: Sampling) -> list[Completion]:
        await asyncio.sleep(float(os.environ["PAUSE_S"]))
        return await super().generate(prompt, n, seed, how)


def make(model: str, config: GeneratorConfig) -> SlowGenerator:
    return SlowGenerator(script)


def work(words: list[str]) -> int:
    run = Run(load_recipe(words))
    jobs.sample.sample = functools.partial(sample, generator=make)  # type: ignore[attr-defined]
    with session():
        for name in ("ingest", "curate"):
            if not run.is_complete(BY_NAME[name]):
                run_step(run, BY_NAME[name])
        jobs.sample.run(Job(run, BY_NAME["sample"]))  # not by run_step: without documents it needs no evidence
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: work(sys.argv[1:])))
