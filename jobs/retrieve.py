"""queries, questions, images, image_vectors + index -> evidence: passages and similar training images."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.retrieve import Tables, retrieve


def run(job: Job) -> None:
    """Look evidence up for every question."""
    index = job.run.uri("index")
    source = job.table("queries").dataset(rows_per_block=256)
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    with job.lookup_folder("evidence") as folder:
        tables = Tables(
            questions=job.lookup("questions", ["image_ids", "modality"], folder),
            image_vectors=job.lookup(
                "image_vectors",
                ["vector", "error"],
                folder,
                "item_id",
            ),
            images=job.lookup("images", ["sha256"], folder, "image_id"),
        )
        job.make(
            "evidence",
            source,
            ids,
            lambda ds: retrieve(
                ds,
                job.config,
                tables,
                index,
            ),
            "question_id",
        )


if __name__ == "__main__":
    sys.exit(main("retrieve"))
