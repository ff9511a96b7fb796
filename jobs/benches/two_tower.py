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
    """Time an epoch on stored states and one that runs the text tower; and making and writing the states once."""
    console.print(set_up_torch(config.dtype, config.device, config.threads))
    shape = SHAPES[config.shape]
    model = reward_model(shape, config.dtype, config.device, context=8192)
    with tempfile.TemporaryDirectory() as folder:
        model.add_image_tower(config.tower or small_tower(Path(folder)))
    assert model.image_tower is not None
    model.image_tower.requires_grad_(not config.freeze_image_tower)
    questions: list[BenchQuestion] = []
    question_pictures: list[list[Image]] = []
    for seed in range(config.questions):
        questions.append(
            bench_question(shape.vocab_size, config.question, config.documents, config.solutions, config.solution, seed)
        )
        question_pictures.append(pictures(1 + config.references, seed))

    started = time.perf_counter()
    stored = [text_states(model, question) for question in questions]
    forward_seconds = time.perf_counter() - started
    started = time.perf_counter()
    num_bytes = write(stored)
    write_seconds = time.perf_counter() - started

    epoch_on_states = epoch(model, lambda i: stored[i], question_pictures)
    epoch_on_text = epoch(model, lambda i: text_states(model, questions[i]), question_pictures)
    epoch_on_states()  # warm
    ours, _ = timed(epoch_on_states, config.repeats, config.device)
    theirs, _ = timed(epoch_on_text, 1, config.device)
    num_solutions = config.questions * config.solutions
    what = (
        f"{config.shape}, {config.questions} questions x {config.solutions}, documents {config.documents:,}, "
        f"{config.references} references, image tower {'frozen' if config.freeze_image_tower else 'trained'}"
    )
    yield Measured(
        f"two_tower epoch, {what}",
        num_solutions / theirs,
        num_solutions / ours,
        theirs / ours,
        "≥ 50",
        "solutions/s",
    )
    once = f"states once: forward {forward_seconds:.1f} s, write {num_bytes / 2**20:.1f} MiB"
    yield Measured(once, forward_seconds, write_seconds, write_seconds / forward_seconds, "", "s")


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
    """Pictures of noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    images: list[Image.Image] = []
    for _ in range(number):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
    return images


def text_states(model: "RewardModel", question: BenchQuestion) -> "list[SolutionStates]":
    """The text tower's states of a question's solutions."""
    return model.text_states(question.question, question.solutions, question.documents)


def write(stored: "list[list[SolutionStates]]") -> int:
    """Write the states' bytes as the table has them to the disk; gives their number."""
    from medmm_ray.reward_model.states import to_bytes

    num_bytes = 0
    with tempfile.TemporaryFile() as sink:
        for states in stored:
            for solution in states:
                num_bytes += sink.write(to_bytes(solution.states_TD))
                num_bytes += sink.write(to_bytes(solution.summaries_TD))
    return num_bytes


def epoch(
    model: "RewardModel",
    states_of: "Callable[[int], list[SolutionStates]]",
    question_pictures: "list[list[Image]]",
) -> Callable[[], None]:
    """An epoch of training, forward and backward, over the questions; each has its own picture first, then references.

    `states_of` gives the states of a question's solutions.
    """
    fusion = model.fusion
    assert fusion is not None

    def run() -> None:
        for number, (own_picture, *references) in enumerate(question_pictures):
            states = states_of(number)
            features = model.image_features([own_picture], references)
            delta_TD = fusion(_joined(states, "states_TD"), _joined(states, "summaries_TD"), features)
            log_odds_T = _joined(states, "log_odds_T") + model.head_log_odds(delta_TD)
            fusion.zero_grad()
            loss = torch.nn.functional.softplus(-log_odds_T).mean()
            torch.autograd.backward(loss)

    return run


def _joined(states: "list[SolutionStates]", field: str) -> torch.Tensor:
    """A field of all solutions, one behind the other."""
    # A copy: what was made in inference mode takes no part in a backward pass.
    return torch.cat([getattr(solution, field) for solution in states]).clone()
