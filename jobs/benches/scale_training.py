"""How training scales: the speed-up of its updates over workers, by their floating-point operations.

Each stage's own planner deals random questions' updates to 1, 2, 4, 8 and 64 workers; a round of passes takes as long
as its most expensive one. Communication is left out: it depends on the network, and is the same with perfect shares.
*defaults* are each stage's own settings; *flagship* is a batch of 256 solutions of 64 questions, on Llama-3.1-8B and a
BiomedCLIP that is trained too.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from pydantic import Field

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.image_text import ImageTextConfig
from medmm_ray.train.policy import PolicyConfig
from medmm_ray.train.schedule import Part, Rounds, Units, deal, deal_jointly, epoch_updates, rounds_flops
from medmm_ray.train.text_prm import TextPrmConfig
from medmm_ray.train.throughput import FusionFlops, TrainingFlops
from medmm_ray.train.two_tower import TwoTowerConfig

BATCH: dict[str, Any] = {"batch_size": 256, "questions_per_update": 64}
STAGES: dict[str, TrainConfig] = {
    "image_text, defaults": ImageTextConfig(),
    "image_text, flagship": ImageTextConfig(batch_size=256),
    "policy, defaults": PolicyConfig(),
    "policy, flagship": PolicyConfig(**BATCH),
    "text_prm, defaults": TextPrmConfig(),
    "text_prm, flagship": TextPrmConfig(**BATCH),
    "two_tower, defaults": TwoTowerConfig(),
    "two_tower, flagship": TwoTowerConfig(tokens="both", freeze_image_tower=False, num_references=5, **BATCH),
}
TEXT_WIDTHS = {"defaults": 576, "flagship": 4096}
IMAGE_WIDTHS = {"defaults": 128, "flagship": 768}
TOWER_WEIGHTS = {"defaults": 800_000, "flagship": 86_000_000}  # the phantoms' tower, and a ViT-B/16
PATCHES = {"defaults": 64, "flagship": 196}
SOLUTIONS = {"defaults": 16, "flagship": 64}


class TrainingConfig(Config):
    """What is dealt."""

    workers: tuple[int, ...] = (2, 4, 8, 64)
    """Numbers of workers."""
    updates: int = Field(20, ge=1)
    """Updates that are dealt, of the first epoch."""
    questions: int = Field(256, ge=1)
    """Questions that they come of."""
    prefix: int = 3200
    """Mean tokens of a reward model's prefix: documents, which fill their budget, and the question."""
    prompt: int = 200
    """Mean tokens of a policy's prompt."""
    solution: int = 350
    """Mean tokens of a solution."""
    spread: float = 0.33
    """Standard deviation of the tokens of sampled solutions, as a share of their mean."""
    worked_spread: float = 0.1
    """The same of worked solutions, which a policy is taught; those of phantoms have 0.09."""
    steps: int = 8
    """Mean steps of a solution, from half of them to half as many again."""
    seed: int = 0
    """Seed of the lengths."""


def measure_training(config: TrainingConfig) -> Iterator[Measured]:
    """The speed-up of each stage on each number of workers."""
    for name, stage in STAGES.items():
        units = _units(config, name)
        updates = epoch_updates(units, stage.batch_size, stage.num_questions_per_update, config.seed, epoch=0)[
            : config.updates
        ]
        alone = _flops(stage, units, updates, 1)
        for workers in config.workers:
            speed_up = alone / _flops(stage, units, updates, workers)
            label = f"speed-up of training, {name} (batch {stage.batch_size}), {workers} workers"
            yield Measured(label, workers, speed_up, speed_up / workers, _target(name, workers), "times one worker")
        if stage.num_questions_per_update > 1:
            yield _cost_of_parts(name, stage, units, updates)


def _target(name: str, workers: int) -> str:
    if workers <= 8:
        return "≥ 0.9"
    return "≥ 0.8" if name.endswith("flagship") else ""


def _cost_of_parts(name: str, stage: TrainConfig, units: Units, updates: list[list[Part]]) -> Measured:
    """What it costs one worker that a question's solutions come in several updates."""
    parts = [part for update in updates for part in update]
    whole = 0.0
    for unit in {part.unit for part in parts}:
        solutions = [place for part in parts if part.unit == unit for place in part.solutions]
        share = len(solutions) / len(units.whole(unit).solutions)
        whole += share * float(units.shared_flops[unit]) + units.num_flops([Part(unit, tuple(solutions))])
        whole -= float(units.shared_flops[unit])
    in_parts = units.num_flops(parts)
    label = f"FLOPs of {stage.num_questions_per_update} questions an update against whole ones, {name}"
    return Measured(label, whole / 1e12, in_parts / 1e12, in_parts / whole, "", "TFLOP")


def _flops(stage: TrainConfig, units: Units, updates: list[list[Part]], workers: int) -> float:
    total = 0.0
    for parts in updates:
        total += rounds_flops(_rounds(stage, units, parts, workers), units)
    return total


def _rounds(stage: TrainConfig, units: Units, parts: list[Part], workers: int) -> Rounds:
    if isinstance(stage, ImageTextConfig):
        return deal_jointly(parts, workers, stage.contrast_size)
    return deal(parts, units, workers, stage.micro_batch_tokens)


def _units(config: TrainingConfig, name: str) -> Units:
    """The stage's units with random lengths."""
    stage, shape = name.split(", ")
    random = Random(f"{config.seed}/{name}")
    number = config.questions * (1 if stage != "image_text" else SOLUTIONS[shape])
    names = [f"q{i}" for i in range(number)]
    if stage == "image_text":
        return Units.singles(names)
    if stage == "two_tower":
        return _state_units(config, names, shape, random)
    # A policy from scratch is small by default, and is taught four worked solutions a question.
    solutions = SOLUTIONS[shape] if stage == "text_prm" or shape == "flagship" else 4
    mean_prefix = config.prefix if stage == "text_prm" else config.prompt
    deviation = config.solution * (config.spread if stage == "text_prm" else config.worked_spread)
    count_flops = text_flops("small" if (stage, shape) == ("policy", "defaults") else shape)
    lengths: list[list[int]] = []
    flops: list[list[float]] = []
    prefixes: list[int] = []
    for _ in names:
        # Whole documents are taken while they fit, so that prefixes are of like length.
        prefix = round(random.uniform(0.95, 1.05) * mean_prefix)
        own_lengths: list[int] = []
        for _ in range(solutions):
            own_lengths.append(max(30, round(random.gauss(config.solution, deviation))))
        prefixes.append(prefix)
        lengths.append(own_lengths)
        flops.append([count_flops.branch(prefix, length) for length in own_lengths])
    ones = [[1] * solutions] * len(names)
    return Units.of(names, ones, lengths, flops, prefixes, list(map(count_flops.prefix, prefixes)))


def _state_units(config: TrainingConfig, names: list[str], shape: str, random: Random) -> Units:
    import torch

    from medmm_ray.reward_model import Fusion, FusionConfig

    settings = STAGES[f"two_tower, {shape}"]
    assert isinstance(settings, TwoTowerConfig)
    with torch.device("meta"):
        fusion = Fusion(FusionConfig(tokens=settings.tokens), TEXT_WIDTHS[shape], IMAGE_WIDTHS[shape])
    count_flops = FusionFlops(fusion, TOWER_WEIGHTS[shape], PATCHES[shape], settings.freeze_image_tower)
    steps: list[list[int]] = []
    for _ in names:
        fewest, most = config.steps // 2, config.steps + config.steps // 2
        steps.append([random.randint(fewest, most) for _ in range(SOLUTIONS[shape])])
    flops: list[list[float]] = []
    for of_question in steps:
        flops.append([count_flops.per_tag * number for number in of_question])
    pictures = [count_flops.per_picture * (1 + settings.num_references)] * len(names)
    ones = [[1] * SOLUTIONS[shape]] * len(names)
    return Units.of(names, ones, steps, flops, [0] * len(names), pictures)


_TEXT_SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "defaults": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
    "flagship": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
}
_KEY_VALUE_HEADS = {"small": 4, "defaults": 3, "flagship": 8}


def text_flops(shape: str) -> TrainingFlops:
    """What training costs a small Llama, SmolLM2-135M or Llama-3.1-8B; the model has no memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        settings = LlamaConfig(**_TEXT_SHAPES[shape], num_key_value_heads=_KEY_VALUE_HEADS[shape], vocab_size=1024)
        return TrainingFlops(LlamaForCausalLM(settings))  # type: ignore[no-untyped-call]
