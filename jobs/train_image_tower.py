"""Training images with captions -> image_tower, an open_clip checkpoint."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.sources import WITH_TRUTH, load_with_truth
from medmm_ray.train.image_text import train_image_tower

SCHEMA = pa.schema([("image_uri", pa.string()), ("captions", pa.list_(pa.string()))])


def run(job: Job) -> None:
    """Train on every image of the training split that has a caption."""
    captions_by_uri: dict[str, list[str]] = {}
    for image in job.read("images").to_pylist():
        if image["split"] == "train" and not image["error"]:
            captions_by_uri[image["uri"]] = list(captions(job.recipe.ingest.names, image))
    rows = [{"image_uri": uri, "captions": texts} for uri, texts in captions_by_uri.items() if texts]
    table = pa.Table.from_pylist(rows, SCHEMA)
    job.make_artifact("image_tower", lambda uri: train_image_tower(job.config, table, uri, job.run_name), resumes=True)


def captions(sources: Sequence[str], image: Mapping[str, Any]) -> Sequence[str]:
    """What a picture shows, in words: a source that draws it says it in several ways, others by the diagnosis."""
    for source in sources:
        if source in WITH_TRUTH:
            # Pictures of other sources lie beside the drawn ones.
            with contextlib.suppress(ValueError):
                return load_with_truth(source).drawn_picture(image["annotation"]).captions()
    return [image["diagnosis"]] if image["diagnosis"] else []


if __name__ == "__main__":
    sys.exit(main("train_image_tower"))
