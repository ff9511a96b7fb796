"""image_vectors, document_vectors -> index: two FAISS indexes."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.tables import Artifact
from medmm_ray.steps.index import build_index


def run(job: Job) -> None:
    """Build both indexes into one artifact."""
    images, documents = job.read("image_vectors"), job.read("document_vectors")
    job.make_artifact("index", lambda uri: build_index(images, documents, job.config, Artifact(uri)))


if __name__ == "__main__":
    sys.exit(main("index"))
