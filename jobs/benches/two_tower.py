"""Training the image part on stored states against reading the frozen text tower anew, with our own prefix sharing.

An epoch is a pass, forward and backward, over some questions; both sides look at the same pictures through the same
image tower. The stored states are in memory, as in training; the time to make and write them is a row of its own.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.models import SHAPES, BenchQuestion, ModelConfig, bench_question, reward_model, set_up_torch
from jobs.benches.timing import timed

if TYPE_CHECKING:
    from PIL.Image import Image

    from medmm_ray.reward_model import RewardModel, SolutionStates


class BenchConfig(ModelConfig):
    """What is trained."""

    shape: Literal["smollm2", "wide", "8b"] = "smollm2"
    """The text tower: random weights."""
    questions: int = 2
    """Questions of an epoch."""
    solutions: int = 16
    """Solutions of a question."""
    documents: int = 3072
    """Tokens of documents."""
    references: int = 3
    """Reference images of a question."""
    freeze_image_tower: bool = True
    """Train the fusion alone; false: the image tower too, which costs both sides the same."""
    tower: str | None = None
    """Image tower; null: the phantoms' shape (64 pixels, ViT 128 x 4) with random weights."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    console.print(set_up_torch(config.dtype, config.device, config.threads))
    shape = SHAPES[config.shape]
    model = reward_model(shape, config.dtype, config.device, context=8192)
    with tempfile.TemporaryDirectory() as folder:
        model.add_image_tower(config.tower or small_tower(Path(folder)))
    assert model.image_tower is not None
    model.image_tower.requires_grad_(not config.freeze_image_tower)
    asked = [
        bench_question(shape.vocab_size, config.question, config.documents, config.solutions, config.solution, seed)
        for seed in range(config.questions)
    ]
    looks = [pictures(1 + config.references, seed) for seed in range(config.questions)]

    started = time.perf_counter()
    stored = [read(model, one) for one in asked]
    reading = time.perf_counter() - started
    started = time.perf_counter()
    size = write(stored)
    writing = time.perf_counter() - started

    cached = epoch(model, lambda i: stored[i], looks)
    live = epoch(model, lambda i: read(model, asked[i]), looks)
    cached()  # warm
    ours, _ = timed(cached, config.repeats, config.device)
    theirs, _ = timed(live, 1, config.device)
    of_all = config.questions * config.solutions
    what = (
        f"{config.shape}, {config.questions} questions x {config.solutions}, documents {config.documents:,}, "
        f"{config.references} references, image tower {'frozen' if config.freeze_image_tower else 'trained'}"
    )
    yield Measured(f"two_tower epoch, {what}", of_all / theirs, of_all / ours, theirs / ours, "≥ 50", "solutions/s")
    yield Measured(f"states once: read {reading:.1f} s, write {size / 2**20:.1f} MiB", reading, writing,
                   writing / reading, "", "s")  # fmt: skip


def small_tower(folder: Path) -> str:
    """The phantoms' image tower with random weights."""
    from open_clip import CLIP

    from medmm_ray.engines.image_tower import save_open_clip
    from medmm_ray.engines.tokenizer import build_tokenizer
    from medmm_ray.train.image_text import ClipShape, model_config

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a chest radiograph with a finding"], ends_texts=True)
    settings = model_config(ClipShape(), len(tokenizer), int(tokenizer.eos_token_id))
    save_open_clip(folder, settings, CLIP(**settings).state_dict(), tokenizer)
    return str(folder)


def pictures(number: int, seed: int) -> "list[Image]":
    from PIL import Image

    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(number)]


def read(model: "RewardModel", asked: BenchQuestion) -> "list[SolutionStates]":
    return model.text_states(asked.question, asked.solutions, asked.documents)


def write(stored: "list[list[SolutionStates]]") -> int:
    """The states' bytes as the table keeps them, on the disk."""
    from medmm_ray.reward_model.states import to_bytes

    size = 0
    with tempfile.TemporaryFile() as sink:
        for states in stored:
            for own in states:
                size += sink.write(to_bytes(own.states_TD)) + sink.write(to_bytes(own.summaries_TD))
    return size


def epoch(
    model: "RewardModel", states_of: "Callable[[int], list[SolutionStates]]", looks: "list[list[Image]]"
) -> Callable[[], None]:
    fusion = model.fusion
    assert fusion is not None

    def run() -> None:
        for number, (own, *references) in enumerate(looks):
            states = states_of(number)
            features = model.image_features([own], references)
            states_TD = torch.cat([s.states_TD for s in states]).clone()
            summaries_TD = torch.cat([s.summaries_TD for s in states]).clone()
            text_T = torch.cat([s.log_odds_T for s in states]).clone()
            log_odds_T = text_T + model.head_log_odds(fusion(states_TD, summaries_TD, features))
            fusion.zero_grad()
            torch.autograd.backward(torch.nn.functional.softplus(-log_odds_T).mean())

    return run
