"""The source -> raw_questions, raw_images, documents, demonstrations."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.ingest import (
    demonstration_rows,
    document_rows,
    image_table,
    inspect_images,
    question_rows,
    read_source,
)


def run(job: Job) -> None:
    """Read the source, inspect its images, and write its questions, documents and worked solutions."""
    import ray

    job.waiting = f"source {job.config.source}"
    data = read_source(job.config)
    folder = f"{job.table('raw_images').uri}/files"
    images = image_table(data, folder)
    # Small blocks, so that drawing and hashing spread over all workers.
    source = ray.data.from_arrow(images).repartition(target_num_rows_per_block=256)
    job.make(
        "raw_images", source, images["uri"].to_pylist(), lambda ds: inspect_images(ds, job.config, data.draw), "uri"
    )
    # A question's id contains the hashes of its images: they must be there first.
    rows = question_rows(data, job.read("raw_images"), job.config, folder)
    job.make_rows("raw_questions", rows, "question_id")
    job.make_rows("documents", document_rows(data), "document_id")
    job.make_rows("demonstrations", demonstration_rows(data, rows, job.config), "question_id")


if __name__ == "__main__":
    sys.exit(main("ingest"))
