"""Images of sources: made where they are no files, opened, hashed and measured in Ray workers."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medmm_ray.config import digest
from medmm_ray.data.records import Image, to_arrow
from medmm_ray.data.sources import (
    Draw,
)
from medmm_ray.data.tables import RowError, TableError, filesystem, write_file
from medmm_ray.engines.images import decode_image, read_bytes

if TYPE_CHECKING:
    from ray.data import Dataset

from medmm_ray.steps.ingest.reading import IngestConfig, ReadSource

SOURCE_COLUMNS = ("uri", "split", "modality", "diagnosis", "annotation")
"""What a source says of an image before its file is opened."""


def image_table(sources: Sequence[ReadSource], folder: str) -> pa.Table:
    """The images to inspect, one row each, keyed by `uri`; drawn ones will lie below `folder`.

    `drawn_by` is the place in `sources` of the one that makes a picture, null where it is a file already.
    """
    rows: dict[str, dict[str, Any]] = {}
    for place, source in enumerate(sources):
        counts: Counter[str] = Counter()
        for image in source.data.images:
            uri = source.uri(image, folder)
            counts[uri] += 1
            # Two rows of one file would give two images of one id.
            if counts[uri] > 1:
                raise TableError(f"the source lists the image {uri} more than once; each file may be listed once")
            values = asdict(image)
            drawn_by = place if values.pop("drawn") else None
            rows.setdefault(uri, {**values, "uri": uri, "drawn_by": drawn_by})
    columns = [(name, pa.string()) for name in SOURCE_COLUMNS]
    schema = pa.schema([*columns, ("drawn_by", pa.int64())])
    return pa.Table.from_pylist(list(rows.values()), schema=schema)


@dataclass(frozen=True)
class Drawing:
    """How a source makes its pictures: from an annotation, at so many pixels a side."""

    draw: Draw
    size: int


def drawings_of(sources: Sequence[ReadSource]) -> list[Drawing | None]:
    """How each source makes its pictures; None for one whose pictures are files."""
    drawings: list[Drawing | None] = []
    for source in sources:
        draw = source.data.draw
        drawings.append(Drawing(draw, source.config.image_size) if draw else None)
    return drawings


def inspect_images(
    ds: "Dataset",
    config: IngestConfig,
    drawings: Sequence[Drawing | None] = (),
) -> "Dataset":
    """Rows of `image_table` to rows of the record Image (`image_id`, hashes, size, or an `error`), keyed by `uri`.

    A picture that a source makes is made from its annotation and written to its uri first.
    """
    return ds.map_batches(
        partial(inspect_batch, drawings=drawings),
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def inspect_batch(batch: pa.Table, drawings: Sequence[Drawing | None] = ()) -> pa.Table:
    """A batch of `image_table` as Image rows."""
    inspected = []
    for row in batch.to_pylist():
        drawn_by = row.get("drawn_by")
        drawing = None if drawn_by is None else drawings[drawn_by]
        inspected.append(inspect_image(row, drawing))
    return to_arrow(Image, inspected)


def inspect_image(row: dict[str, Any], drawing: Drawing | None = None) -> Image:
    """One row of `image_table` as an Image; a file that cannot become a picture gives one with an `error`."""
    import imagehash

    uri = row["uri"]
    from_source = {name: row[name] for name in SOURCE_COLUMNS}
    # A file that is missing or broken is a row with an error, not the end of the step.
    try:
        content = _draw(drawing, row) if drawing else read_bytes(uri)
        picture = decode_image(content, uri)
    except RowError as error:
        return Image(
            image_id=f"im{digest(uri)}",
            sha256="",
            perceptual_hash="",
            width=0,
            height=0,
            **from_source,
            error=str(error),
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return Image(
        image_id=f"im{sha256[:16]}",
        sha256=sha256,
        perceptual_hash=str(imagehash.phash(picture)),
        width=picture.width,
        height=picture.height,
        **from_source,
    )


def _draw(drawing: Drawing, row: dict[str, Any]) -> bytes:
    """The picture of a row, made and written to its uri; what is drawn is saved as PNG."""
    picture = drawing.draw(row["annotation"], drawing.size)
    if isinstance(picture, bytes):
        content = picture
    else:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        content = stream.getvalue()
    fs, path = filesystem(row["uri"])
    # Every worker makes the folder: there is no order among them.
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    write_file(fs, path, content)
    return content
