"""The reward model for a server that reads requests in shared passes: how one is tokenized, read, and scored.

Enters: cases. Leaves: `StepScores`, those of `RewardModel.score`. What a case's requests have in common is kept
between them, by its content and within a bound of bytes: keys and values of the prefix, and what the fusion reads of
the images.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from medmm_ray.reward_model.errors import ImageError
from medmm_ray.reward_model.forward import RowPiece
from medmm_ray.reward_model.full_sequence import Solution
from medmm_ray.reward_model.fusion import ImageFeatures
from medmm_ray.reward_model.model import RewardModel
from medmm_ray.reward_model.occlusion import BATCH, NUM_TILES, HiddenTiles, ImageMaps
from medmm_ray.reward_model.passes import PieceCutter
from medmm_ray.reward_model.prefix_cache import CacheStatistics, PrefixCache
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import StepScores

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT_TOKENS = 64  # of the template and the system prompt, for the estimate
PATCHES = 200  # tokens of an image in an image tower, about: 14 x 14 and one
FEATURES_SHARE = 0.125  # of the cache's bytes: image features are small beside keys and values


class Case(Protocol):
    """What is scored: see `RewardModel.score` for the fields. `context_key` names all but the solutions."""

    @property
    def question(self) -> str:
        """The question with its options."""

    @property
    def solutions(self) -> Sequence[Solution]:
        """Its solutions."""

    @property
    def documents(self) -> Sequence[str]:
        """Its documents."""

    @property
    def image(self) -> "Image | None":
        """Its image."""

    @property
    def reference_images(self) -> "Sequence[Image]":
        """Similar cases."""

    @property
    def context_key(self) -> str:
        """A hash of all but the solutions."""


@dataclass(eq=False)
class ScoringWork:
    """A request that waits: its pieces, and its images until the fusion has read them."""

    request: ScoreRequest
    cutter: PieceCutter
    context_key: str
    pixels_I3HW: Tensor | None = None
    num_images: int = 0
    image_error: str | None = None

    @property
    def tokens_left(self) -> int:
        """Tokens that no piece has had yet."""
        return self.cutter.tokens_left

    @property
    def is_cut(self) -> bool:
        """Whether every piece was given out."""
        return self.cutter.is_cut

    @property
    def has_open_prefix(self) -> bool:
        """Whether its next pass reads a prefix that others of the same case would read too."""
        return self.cutter.has_open_prefix

    def take(self, room: int, soft_room: int, is_first: bool) -> RowPiece | None:
        """The next piece (`PieceCutter.take`)."""
        return self.cutter.take(room, soft_room, is_first)


@dataclass(frozen=True)
class TileMapCase:
    """A case whose image is to be mapped: `RewardEngine` gives its tile maps in place of scores."""

    case: Case


@dataclass(frozen=True)
class TilePiece:
    """Images of a `TileMapWork` from `start` to `stop`, as many tokens as a pass takes as long for."""

    start: int
    stop: int
    num_tokens: int


@dataclass(eq=False)
class TileMapWork:
    """A request for tile maps that waits: its text, and then its images, of which each costs `image_tokens`."""

    text: ScoringWork
    tiles: HiddenTiles
    image_tokens: int
    num_given: int = 0

    @property
    def context_key(self) -> str:
        """That of its text."""
        return self.text.context_key

    @property
    def tokens_left(self) -> int:
        """Tokens that no piece has had yet."""
        return self.text.tokens_left + (self.tiles.num_images - self.num_given) * self.image_tokens

    @property
    def is_cut(self) -> bool:
        """Whether every piece was given out."""
        return self.text.is_cut and self.num_given == self.tiles.num_images

    @property
    def has_open_prefix(self) -> bool:
        """Whether its next pass reads a prefix that others of the same case would read too."""
        return self.text.has_open_prefix

    def take(self, room: int, soft_room: int, is_first: bool) -> "RowPiece | TilePiece | None":
        """The next piece: of the text while there is any, then as many images as fit, one where it is the first."""
        if not self.text.is_cut:
            return self.text.take(room, soft_room, is_first)
        num_fitting = max(room // self.image_tokens, int(is_first))
        stop = min(self.num_given + num_fitting, self.num_given + BATCH, self.tiles.num_images)
        if stop == self.num_given:
            return None
        piece = TilePiece(self.num_given, stop, (stop - self.num_given) * self.image_tokens)
        self.num_given = stop
        return piece


EngineWork = ScoringWork | TileMapWork


class FeatureCache:
    """Image features of cases, at most `max_bytes` of them; those used least recently go first."""

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()

    def get(self, context_key: str) -> ImageFeatures | None:
        """The features of a case, if they are here."""
        with self._lock:
            features = self._features.get(context_key)
            if features is not None:
                self._features.move_to_end(context_key)
            return features

    def add(self, context_key: str, features: ImageFeatures) -> None:
        """Keep a case's features."""
        with self._lock:
            if context_key in self._features:
                return
            # Counted once, when they come: they never change.
            self._features[context_key] = features
            self.num_bytes += _num_bytes(features)
            while self.num_bytes > self.max_bytes:
                _, oldest = self._features.popitem(last=False)
                self.num_bytes -= _num_bytes(oldest)


def _num_bytes(features: ImageFeatures) -> int:
    total = 0
    for field in fields(features):
        tensor = getattr(features, field.name)
        total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


class RewardEngine:
    """Scores cases with a reward model; `cache_bytes` of prefixes and image features are kept."""

    def __init__(self, model: RewardModel, cache_bytes: int) -> None:
        self.model = model
        self.prefixes = PrefixCache(int(cache_bytes * (1 - FEATURES_SHARE)))
        self.features = FeatureCache(cache_bytes * FEATURES_SHARE)
        self._chars_per_token = 4.0
        self._image_tokens = _tokens_of_an_image(model)

    def estimate(self, request: "Case | TileMapCase") -> int:
        """Tokens by the number of characters, as many a token as the last request had."""
        if isinstance(request, TileMapCase):
            num_images = 1 + NUM_TILES**2 + len(request.case.reference_images)
            return self.estimate(request.case) + num_images * self._image_tokens
        return PROMPT_TOKENS + int(_num_chars(request) / self._chars_per_token)

    def prepare(self, request: "Case | TileMapCase") -> EngineWork:
        """Tokenize the texts, and bring the images to the image tower's size."""
        if isinstance(request, TileMapCase):
            text = self._text_work(request.case)
            return TileMapWork(text, HiddenTiles(self.model, text.request), self._image_tokens)
        work = self._text_work(request)
        # On this thread too: resizing holds up no pass.
        self._prepare_images(work)
        return work

    def _text_work(self, request: Case) -> ScoringWork:
        score_request = ScoreRequest(
            request.question,
            request.solutions,
            request.documents,
            request.image,
            request.reference_images,
        )
        with torch.inference_mode():  # a language model that reads images embeds them here
            job = self.model.scoring_job(score_request)
        # Texts of one service are alike: the last one tells the next.
        num_tokens = job.packing.num_tokens
        if num_tokens > PROMPT_TOKENS:
            self._chars_per_token = max(1.0, _num_chars(request) / num_tokens)
        # Ids alone do not tell two images apart that a language model reads.
        salt = request.context_key if self.model.vision else ""
        return ScoringWork(score_request, PieceCutter(job, self.prefixes, salt), request.context_key)

    def _prepare_images(self, work: ScoringWork) -> None:
        images = work.request.images
        if self.model.vision or not images or self.features.get(work.context_key) is not None:
            return
        try:
            work.pixels_I3HW = self.model.image_pixels([*images, *work.request.reference_images])
            work.num_images = len(images)
        except ImageError as error:
            work.image_error = str(error)

    def forward(self, pieces: "Sequence[tuple[EngineWork, RowPiece | TilePiece]]") -> None:
        """Read a pass, and keep the prefixes that are complete with it."""
        row: list[RowPiece] = []
        cutters: list[PieceCutter] = []
        # Images first: they may be encoded again where the pass fails, a prefix is extended once.
        for work, piece in pieces:
            if isinstance(work, TileMapWork) and isinstance(piece, TilePiece):
                work.tiles.encode(piece.start, piece.stop)
            elif isinstance(piece, RowPiece):
                row.append(piece)
                cutters.append(work.text.cutter if isinstance(work, TileMapWork) else work.cutter)
        if row:
            self.model.forward_pieces(row)
        # The prefixes are complete once the pass is through, not before.
        for cutter, piece_of_row in zip(cutters, row, strict=True):
            cutter.keep_prefix(piece_of_row)

    def cache_figures(self) -> CacheStatistics:
        """Of prefixes; the bytes are those of image features too."""
        num_bytes = self.prefixes.num_bytes + self.features.num_bytes
        return replace(self.prefixes.statistics, num_bytes=num_bytes)

    def is_complete(self, work: EngineWork) -> bool:
        """Whether each solution was read or has an error, and every image that is asked for was encoded."""
        if isinstance(work, TileMapWork):
            return self.is_complete(work.text) and work.tiles.num_encoded == work.tiles.num_images
        return work.cutter.job.is_complete

    @torch.inference_mode()
    def result(self, work: EngineWork) -> list[StepScores] | ImageMaps:
        """The scores, one entry a solution, in the request's order; of a `TileMapCase` its maps."""
        if isinstance(work, TileMapWork):
            return work.tiles.maps(work.text.cutter.job.states())
        # With the image part last, as offline: it needs all states of the case.
        states = work.cutter.job.states()
        if work.image_error is None:
            try:
                return self.model.step_scores(states, self._features(work))
            except ImageError as error:
                work.image_error = str(error)
        return [StepScores(error=work.image_error) for _ in states]

    def _features(self, work: ScoringWork) -> ImageFeatures | None:
        if self.model.vision or not work.request.images:
            return None
        features = self.features.get(work.context_key)
        if features is None and work.pixels_I3HW is None:  # dropped since the request came
            features = self.model.features_of(work.request)
        elif features is None:
            assert work.pixels_I3HW is not None
            features = self.model.encode_pixels(work.pixels_I3HW, work.num_images)
        assert features is not None
        self.features.add(work.context_key, features)
        return features


def _tokens_of_an_image(model: RewardModel) -> int:
    """Tokens of the text tower that cost as much as the image tower's pass over an image, by their parameters."""
    if model.image_tower is None:
        return 0
    size_of_tower: int = sum(weight.numel() for weight in model.image_tower.parameters())
    size_of_text: int = sum(weight.numel() for weight in model.text_model.parameters())
    return max(1, round(PATCHES * size_of_tower / size_of_text))


def _num_chars(request: Case) -> int:
    """Characters that are read: the question and the documents once, and every solution."""
    total = len(request.question) + sum(map(len, request.documents))
    for solution in request.solutions:
        total += len(solution) if isinstance(solution, str) else sum(map(len, solution))
    return total
