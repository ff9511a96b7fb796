"""image_vectors, document_vectors -> index: two FAISS indexes."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.tables import Artifact
from medmm_ray.steps.index import build_index, over_ray


def run(job: Job) -> None:
    """Build both indexes into one artifact."""
    tables = {"images": job.table("image_vectors"), "documents": job.table("document_vectors")}
    job.make_artifact(
        "index",
        lambda uri: build_index(tables, job.config, Artifact(uri), over_ray),
        resumes=True,
    )


if __name__ == "__main__":
    sys.exit(main("index"))
