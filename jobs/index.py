"""images, image_vectors, passages -> index: a folder that can be searched."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.tables import Artifact
from medmm_ray.steps.index import build_index, over_ray, sources


def run(job: Job) -> None:
    """Build the collections of images and passages into one artifact."""

    def write(uri: str) -> dict[str, float]:
        tables = [job.table(name) for name in ("images", "image_vectors", "passages")]
        return build_index(sources(*tables), job.config, Artifact(uri), over_ray)

    job.make_artifact("index", write, resumes=True)


if __name__ == "__main__":
    sys.exit(main("index"))
