"""queries, questions, images, image_vectors + index -> evidence: passages and similar training images."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.engines.index.encoders import IndexEncoders
from medmm_ray.steps.index import recorded_encoder
from medmm_ray.steps.retrieve import Tables, retrieve


def run(job: Job) -> None:
    """Look evidence up for every question."""
    index = job.run.uri("index")
    _check_encoders(job, index)
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


def _check_encoders(job: Job, index: str) -> None:
    """Raise `ConfigError` where queries or the questions' images were embedded by others than the index asks for."""
    encoders = IndexEncoders.load(index)
    advice = "Embed again with the index's encoders, or make the index anew"
    if job.config.searches_passage_vectors:
        encoders.check("queries", recorded_encoder(job.table("queries")), index, advice)
    if job.config.num_images:
        encoders.check("images", recorded_encoder(job.table("image_vectors")), index, advice)


if __name__ == "__main__":
    sys.exit(main("retrieve"))
