"""questions + vectors + index -> evidence: documents and similar training images."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.retrieve import IMAGE_COLUMNS, Library, retrieve


def run(job: Job) -> None:
    """Look evidence up for every question."""
    library = Library(
        documents=job.read("documents", ["document_id", "text"]),
        images=job.read("images", IMAGE_COLUMNS),
        query_vectors=job.read("query_vectors"),
        image_vectors=job.read("image_vectors"),
    )
    index = job.run.uri("index")
    source = job.table("questions").dataset(rows_per_block=256)
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    job.make("evidence", source, ids, lambda ds: retrieve(ds, job.config, library, index), "question_id")


if __name__ == "__main__":
    sys.exit(main("retrieve"))
