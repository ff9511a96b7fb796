"""Curation: near texts among a million, altered pictures, and a set composed of three sources, with its leaks.

    python -m jobs.bench curate                   # near texts alone
    python -m jobs.bench curate data=FOLDER       # and real ones: vqa_rad/, pubmedqa/, med_prm/, medsss_eval/ below it
    python -m jobs.bench curate data=FOLDER "parts=[step]" pictures=40   # altered pictures through the step on Ray

Near texts are random ones of which a twentieth is a copy with a word changed. Pictures are altered in four ways.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import PIL.Image
import pyarrow as pa
from PIL import ImageOps
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.curate_step import altered_on_ray
from medmm_ray.config import Config, build
from medmm_ray.data.benchmark_hashes import Guard, shipped
from medmm_ray.data.records import Question, to_arrow
from medmm_ray.steps.curate import CurateConfig, Curated, curate
from medmm_ray.steps.curate.altered import compare_batch, confirmed, describe_batch, propose_altered
from medmm_ray.steps.curate.near_texts import near_texts
from medmm_ray.steps.curate.quotas import quotas_of
from medmm_ray.steps.ingest import (
    IngestConfig,
    SourceConfig,
    drawings_of,
    image_table,
    inspect_batch,
    question_rows,
    read_sources,
)

WORDS, VOCABULARY = 25, 20_000  # of a random text
SECONDS = 300  # of CPU time, what a million texts may take
Part = Literal["texts", "altered", "step", "composed"]
ALTERATIONS: dict[str, Callable[[PIL.Image.Image], PIL.Image.Image]] = {
    "a crop of 5 %": lambda picture: picture.crop((picture.width // 20, picture.height // 20, *picture.size)),
    "a border": lambda picture: ImageOps.expand(picture, border=min(picture.size) // 16, fill=255),
    "3 degrees": lambda picture: picture.rotate(3, resample=PIL.Image.Resampling.BICUBIC),
    "inversion": ImageOps.invert,
}
QUOTAS = {
    "train": {
        "radiology": {"easy": 270, "medium": 450, "hard": 180},
        "clinical": {"easy": 105, "medium": 175, "hard": 70},
    },
    "test": {"clinical": {"easy": 225, "medium": 375, "hard": 150}},
}
"""A set of 2,000 questions, besides the official tests."""


class BenchConfig(Config):
    """How many texts and pictures, and where real data lie."""

    parts: tuple[Part, ...] = ("texts", "altered", "step", "composed")
    """What is measured; of real data nothing without their folder."""
    texts: int = Field(1_000_000, ge=20)
    """Texts among which near ones are looked for."""
    pictures: int = Field(100, ge=1)
    """Pictures that are altered."""
    data: str = ""
    """Folder of real data sets; empty: near texts alone."""
    seed: int = 0
    """Start of all random numbers."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Rows of each part; those of real data where their folder is named."""
    if "texts" in config.parts:
        yield from _near_texts(config)
    if not config.data:
        return
    if "altered" in config.parts:
        yield from _altered(config, Path(config.data) / "vqa_rad" / "images")
    if "step" in config.parts:
        yield from altered_on_ray(Path(config.data) / "vqa_rad" / "images", ALTERATIONS, config.pictures, config.seed)
    if "composed" in config.parts:
        yield from _composed(config, console)


def _near_texts(config: BenchConfig) -> Iterator[Measured]:
    rng = random.Random(config.seed)
    vocabulary = [f"w{number}" for number in range(VOCABULARY)]
    num_copies = config.texts // 20
    texts = [" ".join(rng.choices(vocabulary, k=WORDS)) for _ in range(config.texts - num_copies)]
    planted: set[tuple[int, int]] = set()
    for place in range(num_copies):
        words = texts[place].split()
        words[rng.choice((0, -1))] = "changed"
        planted.add((place, len(texts)))
        texts.append(" ".join(words))
    started = time.process_time()  # not the clock, which counts what runs beside it
    pairs = near_texts(texts, CurateConfig().text_similarity)
    seconds = time.process_time() - started
    name = f"near texts among {config.texts:,}"
    scaled = SECONDS * config.texts / 1_000_000
    yield Measured(f"{name}: CPU seconds of {scaled:g}", scaled, seconds, seconds / scaled, "≤ 1", "s")
    num_planted = len(planted & set(map(tuple, pairs.tolist())))
    share = num_planted / len(planted)
    yield Measured(f"{name}: planted ones found", len(planted), num_planted, share, "≥ 0.99", "pairs")
    share = (len(pairs) - num_planted) / len(pairs)
    yield Measured(f"{name}: others among those found", len(pairs), len(pairs) - num_planted, share, "≤ 0", "pairs")


def _altered(config: BenchConfig, folder: Path) -> Iterator[Measured]:
    files = sorted(folder.glob("*.jpg"))
    chosen = random.Random(config.seed).sample(files, min(config.pictures, len(files)))
    originals = pa.table({"image_id": [file.name for file in files], "uri": list(map(str, files))})
    settings = CurateConfig()
    pairs = propose_altered(originals, describe_batch(originals))
    num_merged = len(confirmed(compare_batch(pairs), settings))
    share = num_merged / max(1, pairs.num_rows)
    name = f"pairs of {len(files)} pictures taken for one, of those compared"
    yield Measured(name, pairs.num_rows, num_merged, share, "≤ 0.002", "pairs")
    for name, alter in ALTERATIONS.items():
        with tempfile.TemporaryDirectory() as work:
            ids, uris = originals["image_id"].to_pylist(), originals["uri"].to_pylist()
            for file in chosen:
                copy = Path(work) / f"{file.stem}.png"
                alter(PIL.Image.open(file).convert("L")).save(copy)
                ids.append(f"copy of {file.name}")
                uris.append(str(copy))
            images = pa.table({"image_id": ids, "uri": uris})
            found_pairs = confirmed(compare_batch(propose_altered(images, describe_batch(images))), settings)
        copies = {(f"copy of {file.name}", file.name) for file in chosen}
        num_found = len(copies & set(found_pairs))
        yield Measured(f"{name}: copies found", len(chosen), num_found, num_found / len(chosen), "≥ 0.9", "pictures")


def _composed(config: BenchConfig, console: Console) -> Iterator[Measured]:
    sources = (
        SourceConfig(name="vqa_rad", path=f"{config.data}/vqa_rad"),
        SourceConfig(name="pubmedqa", path=f"{config.data}/pubmedqa"),
        SourceConfig(name="med_prm", path=f"{config.data}/med_prm"),
        SourceConfig(name="meds3", path=f"{config.data}/medsss_eval"),
    )
    composed = _curated(IngestConfig(sources=sources))
    guard = Guard(shipped())
    num_training = num_leaks = 0
    for question in composed.questions:
        if question.split == "train":
            num_training += 1
            num_leaks += bool(guard.find(question))
    yield Measured("leaks in a composed training set", num_training, num_leaks, num_leaks, "≤ 0", "questions")
    total = sum(quota.count for quota in quotas_of(_settings()))
    num_official = sum(count for name, count in composed.figures.items() if name.startswith("official_test_") and count)
    repeated = composed.figures.get("official_test_repeated", 0.0)
    num_composed = len(composed.questions) - (num_official - repeated)
    yield Measured("composed questions", total, num_composed, num_composed / total, "≥ 1", "questions")
    for note in composed.notes:
        console.print(f"[dim]{note}[/dim]")
    for name, value in composed.figures.items():
        console.print(f"[dim]{name}: {value:,.0f}[/dim]")


def _settings() -> CurateConfig:
    return build(CurateConfig, {"difficulty": "estimate", "quotas": QUOTAS}, "bench")


def _curated(config: IngestConfig) -> Curated:
    with tempfile.TemporaryDirectory() as work:
        sources = read_sources(config)
        images = inspect_batch(image_table(sources, work), drawings_of(sources))
        questions = to_arrow(Question, question_rows(sources, images, work))
    return curate(questions, images, {}, _settings())
