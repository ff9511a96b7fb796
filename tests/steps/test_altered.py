"""A picture that was cropped, bordered, turned or inverted is still one picture; two that are alike are two."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from PIL import ImageOps

from medmm_ray.steps.curate import CurateConfig
from medmm_ray.steps.curate.altered import (
    aligned_correlation,
    compare_batch,
    confirmed,
    describe_batch,
    propose_altered,
    views,
)
from tests.paths import REAL_DATA

REAL = REAL_DATA / "vqa_rad" / "images"
CONFIG = CurateConfig()


def crop(picture: PIL.Image.Image) -> PIL.Image.Image:
    width, height = picture.size
    return picture.crop((width // 20, height // 20, width, height))


ALTERATIONS: dict[str, Callable[[PIL.Image.Image], PIL.Image.Image]] = {
    "crop": crop,
    "border": lambda picture: ImageOps.expand(picture, border=min(picture.size) // 16, fill=255),
    "rotation": lambda picture: picture.rotate(3, resample=PIL.Image.Resampling.BICUBIC),
    "inversion": ImageOps.invert,
}


def drawn(seed: int) -> PIL.Image.Image:
    """A picture of blobs and lines, each seed another."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:200, 0:240]
    picture = np.full((200, 240), 60.0)
    for _ in range(25):
        row, column, size = rng.uniform(20, 180), rng.uniform(20, 220), rng.uniform(4, 18)
        picture += rng.uniform(-60, 120) * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * size**2))
    return PIL.Image.fromarray(np.clip(picture + rng.normal(0, 1, picture.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_picture_is_confirmed_and_another_is_not(name: str) -> None:
    scores, others = [], []
    for seed in range(6):
        picture = drawn(seed)
        altered = views(ALTERATIONS[name](picture))
        scores.append(aligned_correlation(views(picture), altered))
        others.append(aligned_correlation(views(drawn(seed + 100)), altered))
    assert min(scores) >= CONFIG.aligned_correlation
    assert max(others) < 0.6


def pairs_of(folder: Path, pictures: dict[str, PIL.Image.Image]) -> list[tuple[str, str]]:
    """The pairs that are found among pictures, by their names."""
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    images = pa.table({"image_id": list(pictures), "uri": [str(folder / f"{name}.png") for name in pictures]})
    return confirmed(compare_batch(propose_altered(images, describe_batch(images))), CONFIG)


def test_pairs_are_found_among_many(tmp_path: Path) -> None:
    pictures = {f"p{seed:02d}": drawn(seed) for seed in range(30)}
    for place, (name, alter) in enumerate(ALTERATIONS.items()):
        pictures[f"x-{name}"] = alter(pictures[f"p{place:02d}"])
    expected = sorted((f"p{place:02d}", f"x-{name}") for place, name in enumerate(ALTERATIONS))
    assert pairs_of(tmp_path, pictures) == expected


def test_what_cannot_be_opened_or_shows_nothing_resembles_none(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    black = PIL.Image.new("L", (50, 50))
    assert pairs_of(tmp_path, {"a": black, "b": black}) == []
    images = pa.table({"image_id": ["a", "x"], "uri": [str(tmp_path / "a.png"), str(tmp_path / "broken.png")]})
    described = describe_batch(images)
    assert described["descriptors"].to_pylist()[1] == b""
    assert propose_altered(images, described).num_rows == 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_alterations_of_real_radiographs(tmp_path: Path) -> None:
    pictures = {file.stem: PIL.Image.open(file).convert("L") for file in sorted(REAL.glob("*.jpg"))[:40]}
    chosen = sorted(pictures)[::4]
    altered = {f"x-{name}-{key}": alter(pictures[key]) for key in chosen for name, alter in ALTERATIONS.items()}
    for key in pictures:
        pictures[key].thumbnail((256, 256))
    found_pairs = pairs_of(tmp_path, pictures | altered)
    copies_of = {key: {other for pair in found_pairs if key in pair for other in pair} for key in chosen}
    num_found = sum(f"x-{name}-{key}" in copies_of[key] for key in chosen for name in ALTERATIONS)
    assert num_found >= 0.9 * len(altered)
    strangers = [pair for pair in found_pairs if pair[0].rpartition("-")[2] != pair[1].rpartition("-")[2]]
    assert len(strangers) <= 1
