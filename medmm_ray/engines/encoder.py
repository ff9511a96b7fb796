"""Pictures and texts as vectors of unit length: `ImageEncoder` and `TextEncoder`.

Both load their model in the constructor and take a list a call; the caller chooses how many at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.checkpoints import HUB_PREFIX, resolve

if TYPE_CHECKING:
    from PIL.Image import Image

Vectors = NDArray[np.float32]


class ImageEncoder:
    """An image tower (`engines.image_tower`) for inference; `path` as in `checkpoints.resolve`."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        from medmm_ray.engines.image_tower import ImageTower

        self.device = device
        self.tower = ImageTower.from_pretrained(path).to(device).requires_grad_(False)
        self.width = self.tower.embed_dim

    def encode(self, images: Sequence["Image"]) -> Vectors:
        """RGB pictures as vectors_ND, float32, each of unit length."""
        import torch

        if not images:
            return np.zeros((0, self.width), np.float32)
        pixels_N3HW = torch.stack([self.tower.preprocess(image) for image in images]).to(self.device)
        with torch.inference_mode():
            return _unit(self.tower.embed(pixels_N3HW).float().cpu().numpy())


class TextEncoder:
    """A sentence-transformers model, or the text half of an open_clip checkpoint; `path` as in `checkpoints.resolve`.

    A text longer than the model's context is cut at its end.
    """

    def __init__(self, path: str, device: str = "cpu") -> None:
        folder = resolve(path)
        clip = folder.startswith(HUB_PREFIX) or (Path(folder) / "open_clip_config.json").is_file()
        self._model = _ClipText(folder, device) if clip else _Sentences(folder, device)
        self.width = self._model.width

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Texts as vectors_ND, float32, each of unit length."""
        if not texts:
            return np.zeros((0, self.width), np.float32)
        return _unit(self._model.encode(list(texts)))


class _Sentences:
    def __init__(self, folder: str, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        if Path(folder).is_dir() and not (Path(folder) / "modules.json").is_file():
            raise ConfigError(
                f"text encoder {folder}: holds neither modules.json (sentence-transformers) nor open_clip_config.json"
            )
        self._model: Any = SentenceTransformer(folder, device=device)
        self.width = int(self._model.get_embedding_dimension())

    def encode(self, texts: list[str]) -> Vectors:
        vectors_ND: Vectors = self._model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return vectors_ND


class _ClipText:
    def __init__(self, folder: str, device: str) -> None:
        import open_clip

        name = folder if folder.startswith(HUB_PREFIX) else f"local-dir:{folder}"
        self._model: Any = open_clip.create_model(name, device=device, require_pretrained=True).eval()
        self._tokenize: Any = open_clip.get_tokenizer(name)
        self._device = device
        self.width = int(open_clip.get_model_config(name)["embed_dim"])

    def encode(self, texts: list[str]) -> Vectors:
        import torch

        with torch.inference_mode():
            vectors_ND: Vectors = self._model.encode_text(self._tokenize(texts).to(self._device)).float().cpu().numpy()
        return vectors_ND


def _unit(vectors_ND: Vectors) -> Vectors:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit_ND: Vectors = (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)
    return unit_ND
