"""image_vectors, document_vectors -> index: two FAISS indexes."""

import sys

from jobs.step import Job, main
from medmm_ray.indexing import build_index
from medmm_ray.tables import Artifact


def run(job: Job) -> None:
    images, documents = job.read("image_vectors"), job.read("document_vectors")
    job.make_artifact("index", lambda uri: build_index(images, documents, job.config, Artifact(uri)))


if __name__ == "__main__":
    sys.exit(main("index"))
