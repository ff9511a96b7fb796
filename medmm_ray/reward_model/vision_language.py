"""The image input of a vision-language model: images become embeddings that take the place of their tokens'.

Enters: images. Leaves: `ImageEmbeddings`. Each image is encoded by itself, once a question, so that no embedding
depends on another image. Served are LLaVA and InternVL, whose language models count positions in one dimension;
InternVL's image processor cuts an image into tiles.

Legend: N rows of one image, I rows of all images, D text width.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoImageProcessor
from transformers.utils.hub import cached_file

from medmm_ray.reward_model.errors import CheckpointError
from medmm_ray.reward_model.families import ImageTokens
from medmm_ray.reward_model.image_inputs import rgb_of
from medmm_ray.reward_model.packing import ImageEmbeddings

if TYPE_CHECKING:
    from PIL.Image import Image

# By model type: options of the image processor, and what stands around an image's token in the text.
_MODEL_TYPES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "llava": ({}, ("", "")),
    "internvl": ({"crop_to_patches": True}, ("<img>", "</img>")),
}


_PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json")


def check(path: str | Path, config: Any) -> None:
    """Raise where a checkpoint's images cannot be read."""
    if config.model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"{path} is of the type {config.model_type}; images are read by language models of the types "
            f"{', '.join(_MODEL_TYPES)}"
        )


def chat_template(path: str | Path, revision: str | None) -> str | None:
    """The template of a checkpoint whose processor has it, not its tokenizer, as older ones do."""
    file = _file(path, "chat_template.json", revision)
    return json.loads(Path(file).read_text())["chat_template"] if file else None


def _file(path: str | Path, name: str, revision: str | None) -> str | None:
    file: str | None = cached_file(
        str(path),
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return file


class Vision:
    """A model's image processor, and how its images stand in the text; one has at most `max_image_tokens` tokens."""

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, source: str | Path, revision: str | None
    ) -> None:
        self.image_processor, self.source, self.revision = image_processor, str(source), revision
        self.options, (before, after) = _MODEL_TYPES[model.config.model_type]
        token_id = model.config.image_token_id
        token = tokenizer.convert_ids_to_tokens(token_id)
        self.image_tokens = ImageTokens(token, token_id, f"{before}{token}{after}")
        # An image that is cut into tiles is given as a whole, too.
        max_tiles = image_processor.max_patches + 1 if "crop_to_patches" in self.options else 1
        self.max_image_tokens = int(model.config.image_seq_length) * max_tiles

    @classmethod
    def from_pretrained(cls, path: str | Path, model: Any, tokenizer: Any, revision: str | None) -> "Vision":
        """The vision of a checkpoint whose model and tokenizer are read."""
        try:
            image_processor = AutoImageProcessor.from_pretrained(path, revision=revision)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} has no image processor that can be read: {error}") from error
        return cls(model, tokenizer, image_processor, path, revision)

    def save_pretrained(self, folder: Path) -> None:
        """Write the image processor, and what else the source says of its processor, for others who open the folder."""
        self.image_processor.save_pretrained(folder)
        for name in _PROCESSOR_FILES:
            file = _file(self.source, name, self.revision)
            if file is not None and Path(file).parent != folder:
                shutil.copyfile(file, folder / name)

    @torch.no_grad()
    def embed(self, model: Any, images: Sequence["Image"]) -> ImageEmbeddings:
        """One question's images, in order; raises `ImageError` where one cannot be decoded."""
        weight = model.get_input_embeddings().weight
        rows: list[torch.Tensor] = []
        for image in images:
            pixels = self.image_processor(rgb_of(image), return_tensors="pt", **self.options)["pixel_values"]
            features = model.get_image_features(pixel_values=pixels.to(weight))
            rows.append(torch.cat(list(features.pooler_output)))  # one entry a tile
        return ImageEmbeddings(torch.cat(rows), [len(rows_ND) for rows_ND in rows])
