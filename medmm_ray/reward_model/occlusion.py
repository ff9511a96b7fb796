"""Where in the image a step's score comes from: a tile of the image is hidden, and the step's log-odds change.

Enters: a request with an image, its solutions' states. Leaves: for each step a grid of what each tile adds to its
log-odds (occlusion sensitivity, Zeiler and Fergus 2014, arXiv 1311.2901). Attention says where weight lies, this what
changes the score; it holds for every image tower and every kind of image token that a fusion reads. The text tower is
not run again: of two towers the image part alone depends on the image.

Legend: R, C rows and columns of tiles, M tiles; T steps; B images; W image width; P patches.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from medmm_ray.engines.image_tower import ImageTokens
from medmm_ray.reward_model.fusion import ImageFeatures
from medmm_ray.reward_model.image_inputs import rgb_of
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates

if TYPE_CHECKING:
    from medmm_ray.reward_model.model import RewardModel

NUM_TILES = 8
"""Tiles a side."""
_BATCH = 16  # images that the image tower encodes at a time
_OVERSIZE = 2  # sides of the tower's input that the image may have; a larger one is made smaller once, not once a tile

TileMap = list[list[float]]
"""[R, C]: log-odds that a step loses when the tile is hidden; positive where the tile speaks for the step."""


@torch.inference_mode()
def tile_maps(
    model: "RewardModel", request: ScoreRequest, states: Sequence[SolutionStates], num_tiles: int = NUM_TILES
) -> list[list[TileMap]]:
    """For each solution a map a step, of the question's first image.

    `states` are those of the request's solutions; one with an error has no maps. Raises ValueError where the model has
    no image tower, or the request no image.
    """
    tower, fusion = model.image_tower, model.fusion
    if tower is None or fusion is None or not request.images:
        raise ValueError("tile maps need an image and a reward model with an image tower")
    first, *others = request.images
    image = _reduced(rgb_of(first), _OVERSIZE * tower.image_size)
    # All are encoded together, so that the image tower reads full batches.
    hidden = list(_hidden(image, num_tiles))
    own_images = [image, *hidden, *map(rgb_of, others)]
    pooled_BW, patches_BPW = _encode(model, [*own_images, *map(rgb_of, request.reference_images)])
    beside_it = range(1 + len(hidden), len(own_images))
    references = range(len(own_images), len(pooled_BW))

    def image_part(row: int) -> list[list[float]]:
        """The image part of each step's log-odds with the encoded image `row` in the first one's place."""
        patches = patches_BPW if fusion.reads_patches else None
        features = ImageFeatures.gather(pooled_BW, patches, [[row, *beside_it]], [references])
        return model.image_log_odds(states, features)

    # From the same reduced image: its log-odds may differ from the score's in the third digit.
    whole = image_part(0)
    parts = [image_part(row) for row in range(1, 1 + len(hidden))]
    maps: list[list[TileMap]] = []
    for i, of_solution in enumerate(whole):
        loss_MT = np.array([of_solution]) - np.array([part[i] for part in parts])
        maps.append(loss_MT.T.reshape(-1, num_tiles, num_tiles).tolist())
    return maps


def _reduced(image: Image.Image, longest: int) -> Image.Image:
    """The image with sides of at most `longest` pixels."""
    if max(image.size) <= longest:
        return image
    image = image.copy()
    image.thumbnail((longest, longest))
    return image


def _hidden(image: Image.Image, num_tiles: int) -> Iterator[Image.Image]:
    """The image with one tile after the other, row by row, in the image's mean colour."""
    mean_3 = np.asarray(image).reshape(-1, 3).mean(axis=0)
    red, green, blue = mean_3.round().astype(int).tolist()
    xs = [image.width * i // num_tiles for i in range(num_tiles + 1)]
    ys = [image.height * i // num_tiles for i in range(num_tiles + 1)]
    for top, bottom in itertools.pairwise(ys):
        for left, right in itertools.pairwise(xs):
            copy = image.copy()
            copy.paste((red, green, blue), (left, top, right, bottom))
            yield copy


def _encode(model: "RewardModel", images: Sequence[Image.Image]) -> ImageTokens:
    """The image tower's tokens of images."""
    tower = model.image_tower
    assert tower is not None
    encoded: list[ImageTokens] = []
    for start in range(0, len(images), _BATCH):
        pixels = [tower.preprocess(image) for image in images[start : start + _BATCH]]
        encoded.append(tower(torch.stack(pixels).to(model.device)))
    pooled_BW = torch.cat([tokens.pooled_BD for tokens in encoded])
    return ImageTokens(pooled_BW, torch.cat([tokens.patches_BPD for tokens in encoded]))
