"""Where in the image a step's score comes from: a tile of the image is hidden, and the step's log-odds change.

Enters: a request with an image, its solutions' states. Leaves: for each step a grid of what each tile adds to its
log-odds (occlusion sensitivity, Zeiler and Fergus 2014, arXiv 1311.2901), and beside it the attention over the image's
patches where the fusion reads them. Attention says where weight lies, occlusion what changes the score; it holds for
every image tower and every kind of image token. The text tower is not run again: of two towers the image part alone
depends on the image.

Legend: R, C rows and columns of tiles, M tiles; T steps; B images; W image width; P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from medmm_ray.engines.image_preprocess import Area
from medmm_ray.engines.image_tower import ImageTokens
from medmm_ray.reward_model.fusion import ImageFeatures
from medmm_ray.reward_model.image_inputs import rgb_of
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates, StepAttention

if TYPE_CHECKING:
    from medmm_ray.reward_model.model import RewardModel

NUM_TILES = 8
"""Tiles a side."""
BATCH = 16  # images that the image tower encodes at a time
_OVERSIZE = 2  # sides of the tower's input that the image may have; a larger one is made smaller once, not once a tile

TileMap = list[list[float]]
"""[R, C]: log-odds that a step loses when the tile is hidden; positive where the tile speaks for the step."""


@dataclass(frozen=True)
class PatchAttention:
    """For each solution the attention of its steps; their grids lie over `area` of the image
    (`image_preprocess.Area`)."""

    area: Area
    solutions: list[list[StepAttention]]


@dataclass(frozen=True)
class ImageMaps:
    """For each solution a map a step, and where the attention of the steps lies; None without any over patches."""

    tiles: list[list[TileMap]]
    attention: PatchAttention | None


class HiddenTiles:
    """A request's images, the first one with each of its tiles hidden in turn: encoded some at a time, in any order.

    Raises ValueError where the model has no image tower, or the request no image.
    """

    def __init__(self, model: "RewardModel", request: ScoreRequest, num_tiles: int = NUM_TILES) -> None:
        if model.image_tower is None or model.fusion is None or not request.images:
            raise ValueError("tile maps need an image and a reward model with an image tower")
        first, *others = request.images
        self._model = model
        self._num_tiles = num_tiles
        self._image = _reduced(rgb_of(first), _OVERSIZE * model.image_tower.image_size)
        self._others = [rgb_of(image) for image in others]
        self._references = [rgb_of(image) for image in request.reference_images]
        self._tokens: dict[int, ImageTokens] = {}

    @property
    def num_images(self) -> int:
        """Images to encode: the first one whole, with each tile hidden, and those beside it."""
        return 1 + self._num_tiles**2 + len(self._others) + len(self._references)

    @property
    def num_encoded(self) -> int:
        """Images that are encoded."""
        return sum(len(tokens.pooled_BD) for tokens in self._tokens.values())

    @torch.inference_mode()
    def encode(self, start: int, stop: int) -> None:
        """Encode the images from `start` to `stop`."""
        tower = self._model.image_tower
        assert tower is not None
        pixels = [tower.preprocess(self._picture(place)) for place in range(start, stop)]
        self._tokens[start] = tower(torch.stack(pixels).to(self._model.device))

    def _picture(self, place: int) -> Image.Image:
        num_hidden = 1 + self._num_tiles**2
        if place == 0:
            return self._image
        if place < num_hidden:
            return _hidden(self._image, self._num_tiles, place - 1)
        return [*self._others, *self._references][place - num_hidden]

    @torch.inference_mode()
    def maps(self, states: Sequence[SolutionStates]) -> ImageMaps:
        """The maps of the request's solutions, whose `states` these are, once all images are encoded.

        One with an error has no maps.
        """
        fusion = self._model.fusion
        assert fusion is not None
        in_order = [self._tokens[start] for start in sorted(self._tokens)]
        pooled_BW = torch.cat([tokens.pooled_BD for tokens in in_order])
        patches_BPW = torch.cat([tokens.patches_BPD for tokens in in_order]) if fusion.reads_patches else None
        num_hidden = 1 + self._num_tiles**2
        beside_it = range(num_hidden, num_hidden + len(self._others))
        references = range(num_hidden + len(self._others), self.num_images)

        def features(row: int) -> ImageFeatures:
            """The request's images with the encoded image `row` in the first one's place."""
            return ImageFeatures.gather(pooled_BW, patches_BPW, [[row, *beside_it]], [references])

        # From the same reduced image: its log-odds may differ from the score's in the third digit.
        whole = self._model.image_log_odds(states, features(0))
        parts = [self._model.image_log_odds(states, features(row)) for row in range(1, num_hidden)]
        maps: list[list[TileMap]] = []
        for i, of_solution in enumerate(whole):
            loss_MT = np.array([of_solution]) - np.array([part[i] for part in parts])
            maps.append(loss_MT.T.reshape(-1, self._num_tiles, self._num_tiles).tolist())
        return ImageMaps(maps, self._attention(states, features(0)))

    def _attention(self, states: Sequence[SolutionStates], features: ImageFeatures) -> PatchAttention | None:
        tower = self._model.image_tower
        assert tower is not None
        steps = self._model.patch_attention(states, features)
        return None if steps is None else PatchAttention(tower.area(*self._image.size), steps)


def tile_maps(
    model: "RewardModel", request: ScoreRequest, states: Sequence[SolutionStates], num_tiles: int = NUM_TILES
) -> ImageMaps:
    """The maps of solutions, of the question's first image (`HiddenTiles`)."""
    tiles = HiddenTiles(model, request, num_tiles)
    for start in range(0, tiles.num_images, BATCH):
        tiles.encode(start, min(start + BATCH, tiles.num_images))
    return tiles.maps(states)


def _reduced(image: Image.Image, longest: int) -> Image.Image:
    """The image with sides of at most `longest` pixels."""
    if max(image.size) <= longest:
        return image
    image = image.copy()
    image.thumbnail((longest, longest))
    return image


def _hidden(image: Image.Image, num_tiles: int, tile: int) -> Image.Image:
    """The image with a tile, counted row by row, in the image's mean colour."""
    mean_3 = np.asarray(image).reshape(-1, 3).mean(axis=0)
    red, green, blue = mean_3.round().astype(int).tolist()
    row, column = divmod(tile, num_tiles)
    left, right = (image.width * i // num_tiles for i in (column, column + 1))
    top, bottom = (image.height * i // num_tiles for i in (row, row + 1))
    copy = image.copy()
    copy.paste((red, green, blue), (left, top, right, bottom))
    return copy
