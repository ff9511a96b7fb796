"""Pictures and texts as vectors of unit length: `ImageEncoder` and `TextEncoder`.

Both load their model in the constructor and take a list a call; the caller chooses how many at a time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.checkpoints import HUB_PREFIX, resolve
from medmm_ray.engines.pretrained import check_weights
from medmm_ray.engines.weights import OPEN_CLIP_FILES, check_file, check_files

Vectors = NDArray[np.float32]


class ImageEncoder:
    """An image tower (`engines.image_tower`) for inference; `path` as in `checkpoints.resolve`."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        from medmm_ray.engines.image_tower import ImageTower

        self.device = device
        self.tower = ImageTower.from_pretrained(path, device=device).requires_grad_(False)
        self.width = self.tower.embed_dim

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        """Pictures, as `engines.image_tower.load_preprocess` gives them, as vectors_ND, float32, of unit length."""
        import torch

        if not len(pixels_N3HW):
            return np.zeros((0, self.width), np.float32)
        with torch.inference_mode():
            on_device_N3HW = torch.tensor(pixels_N3HW, device=self.device)
            vectors_NE = self.tower.embed(on_device_N3HW).float().cpu().numpy()
        return _normalized(vectors_NE)


class TextEncoder:
    """A sentence-transformers model, or the text half of an open_clip checkpoint; `path` as in `checkpoints.resolve`.

    A text longer than the model's context is cut at its end.
    """

    def __init__(self, path: str, device: str = "cpu") -> None:
        folder = resolve(path)
        is_clip = folder.startswith(HUB_PREFIX) or (Path(folder) / "open_clip_config.json").is_file()
        self._model = _ClipTextHalf(folder, device) if is_clip else _SentenceTransformer(folder, device)
        self.width = self._model.width

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Texts as vectors_ND, float32, each of unit length."""
        if not texts:
            return np.zeros((0, self.width), np.float32)
        return _normalized(self._model.encode(list(texts)))


# Weights that a sentence encoder does not use: BERT's pooler, the heads that fill in masked words, T5's decoder.
_UNUSED = ("pooler.", "cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "decoder.")


def _module_folders(folder: Path) -> list[Path]:
    """The folders of the modules of a sentence-transformers model, in order."""
    file = folder / "modules.json"
    check_file(file)
    return [folder / module["path"] for module in json.loads(file.read_text())]


class _SentenceTransformer:
    """A model of sentence-transformers, by the library itself."""

    def __init__(self, folder: str, device: str) -> None:
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils.hub import cached_file

        is_folder = Path(folder).is_dir()
        if is_folder and not (Path(folder) / "modules.json").is_file():
            raise ConfigError(
                f"text encoder {folder}: holds neither modules.json (sentence-transformers) nor open_clip_config.json"
            )
        try:
            if is_folder:
                for module_folder in _module_folders(Path(folder)):
                    check_files(module_folder)
            self._model: Any = SentenceTransformer(folder, device=device)
            self._check_transformer(Path(str(cached_file(folder, "modules.json"))).parent)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"text encoder {folder} cannot be read: {error}") from error
        self.width = int(self._model.get_embedding_dimension())

    def _check_transformer(self, folder: Path) -> None:
        """The library is strict with its own modules' weights, but not with those of transformers' model."""
        first = self._model[0]
        module_folder = _module_folders(folder)[0]
        is_adapter = (module_folder / "adapter_config.json").is_file()  # peft checks its own
        if hasattr(first, "auto_model") and not is_adapter:
            model = first.auto_model
            check_weights(type(model), model.config, module_folder, missing=_UNUSED, unexpected=_UNUSED)

    def encode(self, texts: list[str]) -> Vectors:
        """Texts as vectors_ND, as the model gives them."""
        vectors_ND: Vectors = self._model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return vectors_ND


class _ClipTextHalf:
    """The text half of an open_clip checkpoint."""

    def __init__(self, folder: str, device: str) -> None:
        import open_clip
        from safetensors import SafetensorError

        on_hub = folder.startswith(HUB_PREFIX)
        name = folder if on_hub else f"local-dir:{folder}"
        try:
            if not on_hub:
                check_files(Path(folder), OPEN_CLIP_FILES)
            # Strict: it raises where weights are missing, or of no use to the model.
            self._model: Any = open_clip.create_model(name, device=device, require_pretrained=True).eval()
            self._tokenize: Any = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
            raise ConfigError(f"text encoder {folder} cannot be read: {error}") from error
        self._device = device
        self.width = int(open_clip.get_model_config(name)["embed_dim"])

    def encode(self, texts: list[str]) -> Vectors:
        """Texts as vectors_ND, as the model gives them."""
        import torch

        ids_NL = self._tokenize(texts).to(self._device)
        with torch.inference_mode():
            vectors_ND: Vectors = self._model.encode_text(ids_NL).float().cpu().numpy()
        return vectors_ND


def _normalized(vectors_ND: Vectors) -> Vectors:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    # A vector of length 0 stays one: the index refuses it with its number.
    unit_ND: Vectors = (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)
    return unit_ND
