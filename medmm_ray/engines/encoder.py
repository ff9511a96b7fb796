"""Pictures as vectors of unit length: `ImageEncoder`. Texts: `engines.text_encoder`.

It loads its model in the constructor and takes pictures a call; the caller chooses how many at a time.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medmm_ray.engines.encoder_identity import EncoderIdentity, source_of
from medmm_ray.engines.model_source import files_hash

Vectors = NDArray[np.float32]


class ImageEncoder:
    """An image tower (`engines.image_tower`) for inference; `path` as in `checkpoints.resolve`."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        from medmm_ray.engines.image_tower import ImageTower

        self.device = device
        self.tower = ImageTower.from_pretrained(path, device=device).requires_grad_(False)
        self.width = self.tower.embed_dim
        self._source = source_of(path)

    @cached_property
    def identity(self) -> EncoderIdentity:
        """What made the vectors."""
        return EncoderIdentity(self._source, files_hash(self.tower.files()), self.width)

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        """Pictures, as `engines.image_tower.load_preprocess` gives them, as vectors_ND, float32, of unit length."""
        import torch

        if not len(pixels_N3HW):
            return np.zeros((0, self.width), np.float32)
        with torch.inference_mode():
            on_device_N3HW = torch.tensor(pixels_N3HW, device=self.device)
            vectors_NE = self.tower.embed(on_device_N3HW).float().cpu().numpy()
        return normalized(vectors_NE)


def normalized(vectors_ND: Vectors) -> Vectors:
    """The vectors with length 1, float32; one of length 0 stays so."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    # A vector of length 0 stays one: the index refuses it with its number.
    unit_ND: Vectors = (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)
    return unit_ND
