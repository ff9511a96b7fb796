"""Maps of what each tile of an image adds to a step's score, against scores of images that are hidden by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medmm_ray.engines.image_preprocess import Area
from medmm_ray.engines.image_tower import ImageTokens
from medmm_ray.reward_model import FusionConfig, RewardModel, ScoreRequest
from medmm_ray.reward_model.occlusion import tile_maps
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.clip_folders import write_native_clip

GREY = (90, 90, 90)


@pytest.fixture(scope="module")
def two_tower(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("occlusion")
    model = RewardModel.from_pretrained(tiny.save(folder))
    torch.manual_seed(3)
    model.add_image_tower(write_native_clip(folder / "tower"), FusionConfig(tokens="both", width=16, num_heads=2))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight, std=0.5)
    return model.eval()


@pytest.fixture
def bright_corner() -> Image.Image:
    """Grey, with a bright square in the lower left corner; 32 x 32 as the tower reads it."""
    image = Image.new("RGB", (32, 32), GREY)
    image.paste((250, 240, 230), (0, 16, 16, 32))
    return image


def maps_of(
    model: RewardModel, image: Image.Image, num_tiles: int = 2
) -> tuple[ScoreRequest, list[list[list[list[float]]]]]:
    reference = Image.effect_noise((32, 32), 60).convert("RGB")
    request = ScoreRequest(tiny.QUESTION, tiny.SOLUTIONS, tiny.DOCUMENTS, image, [reference])
    states = model.text_states(request.question, request.solutions, request.documents)
    return request, tile_maps(model, request, states, num_tiles).tiles


def test_a_tile_is_worth_what_the_score_loses_without_it(two_tower: RewardModel, bright_corner: Image.Image) -> None:
    request, maps = maps_of(two_tower, bright_corner)
    mean = (130, 128, 125)  # (3 x 90 + 250) / 4 …, to whole numbers as PIL paints them
    whole = two_tower.score(
        request.question, request.solutions, request.documents, bright_corner, request.reference_images
    )
    for row, column in ((0, 0), (1, 0), (1, 1)):
        hidden = bright_corner.copy()
        hidden.paste(mean, (16 * column, 16 * row, 16 * column + 16, 16 * row + 16))
        scores = two_tower.score(
            request.question, request.solutions, request.documents, hidden, request.reference_images
        )
        for of_solution, full, without in zip(maps, whole, scores, strict=True):
            tile = [step_map[row][column] for step_map in of_solution]
            lost = [a - b for a, b in zip(full.image_log_odds, without.image_log_odds, strict=True)]
            assert tile == pytest.approx(lost, abs=1e-4)
            assert max(map(abs, tile)) > 1e-3


class CornerTower(nn.Module):
    """Sees the mean brightness of the lower left quarter, and nothing else."""

    image_size = 32

    def preprocess(self, image: Image.Image) -> Tensor:
        pixels_HW3 = torch.tensor(list(image.getdata()), dtype=torch.float32).reshape(32, 32, 3) / 255
        return pixels_HW3.permute(2, 0, 1)

    def area(self, width: int, height: int) -> Area:
        return (0.0, 0.0, 1.0, height / width)

    def forward(self, pixels_B3HW: Tensor) -> ImageTokens:
        light_B = pixels_B3HW[:, :, 16:, :16].mean(dim=(1, 2, 3))
        pooled_BD = torch.linspace(-1, 1, 24).repeat(len(light_B), 1)
        pooled_BD[:, 0] = 4 * light_B
        return ImageTokens(pooled_BD, pooled_BD[:, None])


@pytest.fixture
def one_eyed(two_tower: RewardModel, monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    monkeypatch.setattr(two_tower, "image_tower", CornerTower())
    return two_tower


def test_a_map_points_where_the_model_looks(one_eyed: RewardModel, bright_corner: Image.Image) -> None:
    _, maps = maps_of(one_eyed, bright_corner, num_tiles=4)
    for of_solution in maps:
        for step_map in of_solution:
            values = torch.tensor(step_map)
            assert bool((values[2:, :2].abs() > 1e-4).all())
            values[2:, :2] = 0
            assert values.abs().max() < 1e-6


def test_a_model_without_an_image_tower_has_no_maps(tmp_path: Path, bright_corner: Image.Image) -> None:
    model = RewardModel.from_pretrained(tiny.save(tmp_path))
    with pytest.raises(ValueError, match="need an image and a reward model with an image tower"):
        maps_of(model, bright_corner)
