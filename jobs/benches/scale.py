"""How a run scales: training over workers, memory of workers and drivers, steps beside each other and over actors."""

from collections.abc import Iterator
from typing import Literal, get_args

from rich.console import Console

from jobs.benches import Measured
from jobs.benches.scale_actors import ActorsConfig, measure_actors
from jobs.benches.scale_driver import DriverConfig, measure_drivers
from jobs.benches.scale_memory import MemoryConfig, measure_memory
from jobs.benches.scale_overlap import OverlapConfig, measure_overlap
from jobs.benches.scale_training import TrainingConfig, measure_training
from medmm_ray.config import Config

Part = Literal["training", "memory", "drivers", "overlap", "actors"]


class BenchConfig(Config):
    """What is measured, and on what."""

    parts: tuple[Part, ...] = get_args(Part)
    """Parts of the benchmark."""
    training: TrainingConfig = TrainingConfig()
    """What is dealt to training's workers."""
    memory: MemoryConfig = MemoryConfig()
    """What a two-tower worker's memory is measured on."""
    drivers: DriverConfig = DriverConfig()
    """What the drivers' memory is measured on."""
    overlap: OverlapConfig = OverlapConfig()
    """What is sampled and judged at a time."""
    actors: ActorsConfig = ActorsConfig()
    """Which steps run on how many actors."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The rows of the parts."""
    if "training" in config.parts:
        yield from measure_training(config.training)
    if "memory" in config.parts:
        yield from measure_memory(config.memory)
    if "drivers" in config.parts:
        yield from measure_drivers(config.drivers)
    if "overlap" in config.parts:
        yield from measure_overlap(config.overlap, console)
    if "actors" in config.parts:
        yield from measure_actors(config.actors, console)
