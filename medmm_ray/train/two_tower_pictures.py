"""Pictures as the image tower of a training sees them: opened when they are needed, ahead of time and in threads, and
kept, or a frozen tower's tokens of them, while there is room.

A `view` of a picture is one of its augmentations; view 0 is the picture as it is.

Legend: B pictures, W image width, P patches, H and W pixels.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medmm_ray.engines.images import open_image
from medmm_ray.train.image_text import augment
from medmm_ray.train.reading import Cache

if TYPE_CHECKING:
    import torch

    from medmm_ray.engines.image_tower import ImageTower

_TOKEN_BATCH = 64  # pictures that a frozen tower looks at together


@dataclass(frozen=True)
class Views:
    """How pictures are shown: moved and brightened by up to so much where `augmented`; a frozen tower has `num_views`
    of each until they repeat."""

    seed: int
    augmented: bool
    num_views: int
    max_shift: int
    max_brightness: float


@dataclass(frozen=True)
class PictureTokens:
    """Tokens of pictures: ``pooled_BW`` and, where they are read, ``patches_BPW``."""

    pooled_BW: "torch.Tensor"
    patches_BPW: "torch.Tensor | None"


class Pictures:
    """The pictures at `uris`, and the tower that encodes them on `device`: anew each time, unless it `is_frozen`."""

    def __init__(
        self,
        tower: "ImageTower",
        uris: Sequence[str],
        views: Views,
        is_frozen: bool,
        reads_patches: bool,
        device: str,
        most_bytes: float,
    ) -> None:
        self.tower = tower
        self.views = views
        self.is_frozen = is_frozen
        self.reads_patches = reads_patches
        self.device = device
        self.uris = sorted(uris)
        self._places = {uri: place for place, uri in enumerate(self.uris)}
        self._pixels: Cache[torch.Tensor] = Cache(0 if is_frozen else most_bytes)
        self._tokens: Cache[PictureTokens] = Cache(most_bytes if is_frozen else 0)
        tower.to(device).eval()

    def load(
        self,
        uris: Sequence[str],
        epoch: int,
    ) -> "dict[str, torch.Tensor]":
        """The pixels that `tokens` will need of these pictures in an epoch; for threads."""
        view = self._view(epoch)
        pixels: dict[str, torch.Tensor] = {}
        for uri in dict.fromkeys(uris):
            # Tokens that are there now may be gone by then: `tokens` opens such a picture itself.
            if self._tokens.get((uri, view)) is None:
                pixels[uri] = self._shown(uri, view)
        return pixels

    def tokens(
        self,
        uris: Sequence[str],
        epoch: int,
        pixels: "Mapping[str, torch.Tensor]",
    ) -> PictureTokens:
        """Tokens of these pictures; `pixels` are those that `load` gave."""
        import torch

        view = self._view(epoch)
        if not self.is_frozen:
            return self._encode(uris, view, pixels)
        encoded = {uri: self._tokens.get((uri, view)) for uri in uris}
        missing = [uri for uri, tokens in encoded.items() if tokens is None]
        for start in range(0, len(missing), _TOKEN_BATCH):
            batch = missing[start : start + _TOKEN_BATCH]
            with torch.no_grad():
                tokens = self._encode(batch, view, pixels)
            for number, uri in enumerate(batch):
                encoded[uri] = self._kept(uri, view, tokens, number)
        in_order = [encoded[uri] for uri in uris]
        pooled = [tokens.pooled_BW for tokens in in_order if tokens is not None]
        patches = [tokens.patches_BPW for tokens in in_order if tokens is not None and tokens.patches_BPW is not None]
        return PictureTokens(
            torch.cat(pooled).to(self.device), torch.cat(patches).to(self.device) if self.reads_patches else None
        )

    def _kept(
        self,
        uri: str,
        view: int,
        tokens: PictureTokens,
        number: int,
    ) -> PictureTokens:
        """One picture's tokens out of a batch's, in the cache where there is room."""
        patches_1PW = None if tokens.patches_BPW is None else tokens.patches_BPW[number : number + 1].cpu().clone()
        # Copies in main memory: a slice would keep the whole batch alive, on the GPU.
        alone = PictureTokens(tokens.pooled_BW[number : number + 1].cpu().clone(), patches_1PW)
        num_bytes = alone.pooled_BW.nbytes + (0 if patches_1PW is None else patches_1PW.nbytes)
        self._tokens.put((uri, view), alone, num_bytes)
        return alone

    def _encode(
        self,
        uris: Sequence[str],
        view: int,
        pixels: "Mapping[str, torch.Tensor]",
    ) -> PictureTokens:
        import torch

        pictures: list[torch.Tensor] = []
        for uri in uris:
            pictures.append(pixels[uri] if uri in pixels else self._shown(uri, view))
        tokens = self.tower(torch.stack(pictures).to(self.device))
        return PictureTokens(tokens.pooled_BD, tokens.patches_BPD if self.reads_patches else None)

    def _view(self, epoch: int) -> int:
        """An epoch has a view of its own; those of a frozen tower repeat."""
        if not self.views.augmented:
            return 0
        return epoch % self.views.num_views if self.is_frozen else epoch

    def _shown(self, uri: str, view: int) -> "torch.Tensor":
        """A view of a picture [3, H, W]."""
        pixels_3HW = self._pixels.get(uri)
        if pixels_3HW is None:
            pixels_3HW = self.tower.preprocess(open_image(uri))
            self._pixels.put(uri, pixels_3HW, pixels_3HW.nbytes)
        if view == 0:  # as it is, which is what it is measured on
            return pixels_3HW
        # By place, not by name: a copy of the run in another folder trains the same, on whichever worker.
        rng = random.Random(f"{self.views.seed}/{view}/{self._places[uri]}")
        return augment(
            pixels_3HW,
            rng,
            self.views.max_shift,
            self.views.max_brightness,
        )
