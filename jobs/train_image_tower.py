"""Training images with captions -> image_tower, an open_clip checkpoint."""

import sys

import pyarrow as pa

from jobs.step import Job, main
from medmm_ray.sources import captions
from medmm_ray.train.image_text import train_image_tower


def run(job: Job) -> None:
    images = [row for row in job.read("images").to_pylist() if row["split"] == "train" and not row["error"]]
    rows = pa.table(
        {
            "image_uri": [row["uri"] for row in images],
            "captions": [list(captions(job.recipe.ingest.source, row)) for row in images],
        }
    )
    job.make_artifact("image_tower", lambda uri: train_image_tower(job.config, rows, [], uri, job.run_name))


if __name__ == "__main__":
    sys.exit(main("train_image_tower"))
