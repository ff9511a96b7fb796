"""Encoders give unit vectors that are the library's own, and do not depend on the batch."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmm_ray.engines.encoder import ImageEncoder, Vectors
from medmm_ray.engines.image_tower import ImageTower, load_preprocess
from medmm_ray.engines.images import open_image
from tests.doubles.clip_folders import write_biomed_clip, write_native_clip

DATA = os.environ.get("MEDMM_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEDMM_TEST_DATA does not name a folder of test data")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_native_clip(tmp_path_factory.mktemp("native")))


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(v) for v in values] + [Image.new("RGB", (1, 1))]


def pixels_of(tower: str, images: list[Image.Image]) -> Vectors:
    preprocess = load_preprocess(tower)
    pixels_N3HW: Vectors = np.stack([preprocess(image).numpy() for image in images])
    return pixels_N3HW


def test_images(native: str) -> None:
    encoder = ImageEncoder(native)
    pixels_N3HW = pixels_of(native, pictures())
    vectors_ND = encoder.encode(pixels_N3HW)
    assert (vectors_ND.shape, str(vectors_ND.dtype), encoder.width) == ((4, 16), "float32", 16)
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    one_by_one = np.concatenate([encoder.encode(pixels_3HW[None]) for pixels_3HW in pixels_N3HW])
    assert np.allclose(vectors_ND, one_by_one, atol=1e-6)
    assert encoder.encode(pixels_N3HW[:0]).shape == (0, 16)


@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_pixels_made_without_the_tower_are_the_towers_own(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = str(write(tmp_path))
    tower = ImageTower.from_pretrained(folder)
    of_tower_N3HW = torch.stack([tower.preprocess(picture) for picture in pictures()])
    pixels_N3HW = pixels_of(folder, pictures())
    assert np.array_equal(pixels_N3HW, of_tower_N3HW.numpy())
    with torch.inference_mode():
        vectors_ND = tower.embed(of_tower_N3HW).numpy()
    assert np.allclose(ImageEncoder(folder).encode(pixels_N3HW), vectors_ND, atol=1e-7)


@needs_data
@pytest.mark.engine
def test_dinov2_finds_the_same_organ_in_vqa_rad() -> None:
    """Leave-one-out over all 314 images: the measured precision@1 is 0.984."""
    rows = [r for part in ("train", "test") for r in json.loads(Path(f"{DATA}/vqa_rad/{part}set.json").read_text())]
    organ = {row["image_name"]: row["image_organ"] for row in rows}
    names = sorted(organ)
    tower = f"{DATA}/models/dinov2-small-registers"
    encoder = ImageEncoder(tower)
    vectors_ND = np.concatenate(
        [
            encoder.encode(pixels_of(tower, [open_image(f"{DATA}/vqa_rad/images/{n}") for n in names[i : i + 16]]))
            for i in range(0, len(names), 16)
        ]
    )
    similarity = vectors_ND @ vectors_ND.T - 2 * np.eye(len(names))
    right = np.mean([organ[names[j]] == organ[names[i]] for i, j in enumerate(similarity.argmax(1))])
    print(f"VQA-RAD, same organ at rank 1: {right:.3f} of {len(names)} images")
    assert right >= 0.98
