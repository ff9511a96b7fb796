"""Pictures of any kind, given to the reward model as PIL has them, look as they do in a file."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmm_ray.engines.image_tower import ImageTower
from medmm_ray.engines.images import decode_image
from medmm_ray.engines.pixels import upright_rgb
from medmm_ray.reward_model import FusionConfig, ImageError, RewardModel
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.clip_folders import write_biomed_clip, write_native_clip

QUESTION = "Which lung shows the effusion? (A) left (B) right"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    made = RewardModel.from_pretrained(tiny.save(tmp_path_factory.mktemp("text_model")))
    made.add_image_tower(write_native_clip(tmp_path_factory.mktemp("tower")), FusionConfig(width=16, num_heads=2))
    assert made.fusion is not None
    torch.nn.init.normal_(made.fusion.output.weight, std=0.5)
    return made.eval()


def grey(dtype: type, top: float) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 12).reshape(3, 4).astype(dtype))


def animation() -> Image.Image:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(sink, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    return Image.open(sink)


def turned() -> Image.Image:
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((8, 4)).convert("RGB").save(sink, "PNG", exif=exif)
    return Image.open(sink)


def odd_exif() -> Image.Image:
    """Turned, and with an exposure bias of -1/0, which PIL reads and cannot write."""
    sink = io.BytesIO()
    Image.linear_gradient("L").resize((8, 4)).convert("RGB").save(sink, "JPEG", quality=100)
    plain = sink.getvalue()
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x9204, 10, 1, 38)
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<Iii", 0, -1, 0)
    return Image.open(io.BytesIO(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]))


def with_nan() -> Image.Image:
    return Image.fromarray(np.array([[np.nan, 0.0], [1.0, np.inf]], np.float32))


KINDS: dict[str, tuple[Callable[[], Image.Image], tuple[int, int], tuple[int, int, int]]] = {
    # what, the size, the last pixel
    "cmyk": (lambda: Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (3, 2), (255, 0, 0)),
    "sixteen_bit": (lambda: grey(np.uint16, 40_000), (4, 3), (255, 255, 255)),
    "float": (lambda: grey(np.float32, 0.5), (4, 3), (255, 255, 255)),
    "nan": (with_nan, (2, 2), (0, 0, 0)),
    "one_bit": (lambda: Image.new("1", (2, 1), 1), (2, 1), (255, 255, 255)),
    "palette": (lambda: Image.new("RGB", (2, 1), "navy").quantize(2), (2, 1), (0, 0, 128)),
    "la": (lambda: Image.new("LA", (2, 1), (10, 0)), (2, 1), (255, 255, 255)),
    "rgba": (lambda: Image.new("RGBA", (2, 1), (10, 20, 30, 255)), (2, 1), (10, 20, 30)),
    "one_pixel": (lambda: Image.new("RGB", (1, 1), (7, 8, 9)), (1, 1), (7, 8, 9)),
    "animation": (animation, (4, 4), (254, 0, 0)),
    "turned": (turned, (4, 8), (33, 33, 33)),
    "odd_exif": (odd_exif, (4, 8), (33, 33, 33)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(model: RewardModel, kind: str) -> None:
    make, size, last = KINDS[kind]
    picture = upright_rgb(make())
    assert (picture.mode, picture.size) == ("RGB", size)
    assert np.abs(np.asarray(picture)[-1, -1].astype(int) - last).max() <= 1
    given, plain = (model.score(QUESTION, [["left"]], image=image)[0] for image in (make(), picture))
    assert given.error is None
    assert given.image_log_odds == plain.image_log_odds != [0.0]


def test_a_picture_in_memory_scores_as_its_file(model: RewardModel) -> None:
    sink = io.BytesIO()
    grey(np.uint16, 40_000).save(sink, "TIFF")
    in_memory = model.score(QUESTION, [["left"]], image=grey(np.uint16, 40_000))
    assert model.score(QUESTION, [["left"]], image=decode_image(sink.getvalue(), "x")) == in_memory


def test_what_is_no_picture(model: RewardModel) -> None:
    with pytest.raises(TypeError, match="an image is a ndarray; expected a PIL image"):
        model.score(QUESTION, [["left"]], image=np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="image_empty: an image is 0 x 4 pixels"):
        model.image_features([Image.new("RGB", (0, 4))])
    sink = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(sink, "JPEG")
    cut = Image.open(io.BytesIO(sink.getvalue()[:700]))
    (scores,) = model.score(QUESTION, [["left"]], image=cut)
    assert str(scores.error).startswith("image_corrupt: an image cannot be decoded: ")


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (1, 60_000), (60_000, 2)])
@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_extremely_long_pictures(write: Callable[[Path], Path], size: tuple[int, int], tmp_path: Path) -> None:
    """A tower that keeps the ratio would resize 1 x 60,000 to 160 x 9,600,000."""
    tower = ImageTower.from_pretrained(write(tmp_path))
    flat = tower.preprocess(Image.new("RGB", (8, 8), (200, 100, 50)))
    assert torch.equal(tower.preprocess(Image.new("RGB", size, (200, 100, 50))), flat)


def test_an_ordinary_picture_is_cropped_as_open_clip_does(tmp_path: Path) -> None:
    import open_clip

    folder = write_biomed_clip(tmp_path)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tower = ImageTower.from_pretrained(folder)
    for size in ((50, 70), (30, 480), (480, 30)):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        assert torch.equal(tower.preprocess(noise), preprocess(noise))
