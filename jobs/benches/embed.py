"""How busy embedding keeps its encoder: images opened in a stage of their own, beside opening them in the encoder.

The encoder sleeps for each batch, as one on a GPU leaves the CPU alone; opening an image sleeps too, as a slow storage
and a decoder make one wait. Ray Data, its tasks and actors are real. The busy share is what the encoder slept of the
time from its first batch to its last.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image as Picture
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.data.records import Image, to_arrow
from medmm_ray.engines.images import MAX_PIXELS
from medmm_ray.steps.embed import EmbedConfig, Preprocess, embed_images, image_vectors

if TYPE_CHECKING:
    from ray.data import Dataset

SIDE = 8  # of a picture, in pixels
Vectors = NDArray[np.float32]


class BenchConfig(Config):
    """How many images, and how long each takes."""

    images: int = Field(640, ge=1)
    """Images."""
    batch_size: int = Field(32, ge=1)
    """Images that the encoder takes at once."""
    encode_s: float = Field(1.0, gt=0)
    """Seconds that the encoder sleeps for a batch."""
    decode_s: float = Field(0.03, ge=0)
    """Seconds that opening an image takes beside its real work."""
    decoders: int = Field(4, ge=1)
    """Tasks that open images at a time: the machine's CPUs beside the encoder's, which are logical here."""


@dataclass(frozen=True)
class SleepingEncoder:
    """An encoder that sleeps for a batch, and notes when, in a file of its process."""

    encode_s: float
    log_folder: str

    @property
    def identity(self) -> None:
        """It has no weights."""

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        """The mean colour of each picture."""
        if not len(pixels_N3HW):
            return np.zeros((0, 3), np.float32)
        started = time.time()
        time.sleep(self.encode_s)
        with Path(self.log_folder, f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{started} {time.time()} {len(pixels_N3HW)}\n")
        means_N3: Vectors = pixels_N3HW.mean((2, 3))
        return means_N3


@dataclass(frozen=True)
class SleepingPreprocess:
    """Opening an image that takes a while."""

    decode_s: float

    def __call__(self, image: Picture.Image) -> Vectors:
        """The picture's pixels_3HW, after the pause."""
        time.sleep(self.decode_s)
        return np.asarray(image, np.float32).transpose(2, 0, 1)


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The encoder's busy share, both ways; vectors must be the same."""
    import ray

    from medmm_ray.session import session

    with tempfile.TemporaryDirectory() as folder, session():
        images = _images(config, Path(folder))
        blocks = [images.slice(first, 2 * config.batch_size) for first in range(0, len(images), 2 * config.batch_size)]
        shares: dict[str, float] = {}
        vectors: dict[str, list[dict[str, Any]]] = {}
        for name, embed in (("inline", _inline), ("own stage", _own_stage)):
            log_folder = Path(folder, name)
            log_folder.mkdir()
            ds = embed(ray.data.from_arrow(blocks), config, str(log_folder))
            vectors[name] = sorted(ds.take_all(), key=lambda row: row["item_id"])
            shares[name] = busy_share(log_folder)
            console.print(f"[dim]{name}: busy {shares[name]:.3f}[/dim]")
        if str(vectors["inline"]) != str(vectors["own stage"]):
            raise AssertionError("images opened in a stage of their own have other vectors")
    ours = shares["own stage"]
    name = "embedding: the encoder's busy share, images opened inline, in a stage of their own"
    yield Measured(name, shares["inline"], ours, ours, "≥ 0.95", "share")


def busy_share(log_folder: Path) -> float:
    """The time that encoders slept, of the time from their first batch to their last."""
    begins: list[float] = []
    ends: list[float] = []
    for file in log_folder.iterdir():
        for line in file.read_text().splitlines():
            begin, end, _ = line.split()
            begins.append(float(begin))
            ends.append(float(end))
    return (sum(ends) - sum(begins)) / (max(ends) - min(begins))


def _images(config: BenchConfig, folder: Path) -> pa.Table:
    rows: list[Image] = []
    for i in range(config.images):
        file = folder / f"{i}.png"
        Picture.new("RGB", (SIDE, SIDE), (i % 256, i // 256 % 256, 100)).save(file)
        rows.append(
            Image(
                image_id=f"im{i:06}",
                uri=str(file),
                sha256="",
                perceptual_hash="",
                width=SIDE,
                height=SIDE,
                split="train",
                modality="radiology",
                diagnosis="",
                annotation="",
            )
        )
    return to_arrow(Image, rows)


def _load_preprocess(_model: str, decode_s: float) -> Preprocess:
    return SleepingPreprocess(decode_s)


def _load_encoder(_model: str, _device: str, encode_s: float, log_folder: str) -> SleepingEncoder:
    return SleepingEncoder(encode_s, log_folder)


def _own_stage(ds: "Dataset", config: BenchConfig, log_folder: str) -> "Dataset":
    import ray

    # So many decoders find room beside the encoder, whatever the machine.
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_cpus = (resources["CPU"] - 1.5) / config.decoders
    return embed_images(
        ds,
        EmbedConfig(image_batch_size=config.batch_size, num_cpus=0.5, decode_num_cpus=num_cpus),
        "",
        partial(_load_preprocess, decode_s=config.decode_s),
        partial(_load_encoder, encode_s=config.encode_s, log_folder=log_folder),
    )


class _InlineActor:
    """Opens and encodes a batch, one after the other."""

    def __init__(self, config: BenchConfig, log_folder: str) -> None:
        self.preprocess = SleepingPreprocess(config.decode_s)
        self.encoder = SleepingEncoder(config.encode_s, log_folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return image_vectors(batch, self.preprocess, self.encoder, MAX_PIXELS)


def _inline(ds: "Dataset", config: BenchConfig, log_folder: str) -> "Dataset":
    from ray.data import ActorPoolStrategy

    return ds.map_batches(
        _InlineActor,
        fn_constructor_args=(config, log_folder),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )
