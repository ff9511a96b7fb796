"""images, image_vectors, passages -> index: a folder that can be searched."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.tables import Artifact
from medmm_ray.engines.index.encoders import IndexEncoders
from medmm_ray.steps.index import build_index, over_ray, recorded_encoder, sources


def run(job: Job) -> None:
    """Build the collections of images and passages into one artifact."""

    def write(uri: str) -> dict[str, float]:
        images, image_vectors, passages = (job.table(name) for name in ("images", "image_vectors", "passages"))
        encoders = IndexEncoders(
            images=recorded_encoder(image_vectors),
            passages=recorded_encoder(passages),
            # Embedded together with the passages; the index is the same with other questions.
            queries=recorded_encoder(job.table("queries")),
        )
        return build_index(sources(images, image_vectors, passages), job.config, Artifact(uri), over_ray, encoders)

    job.make_artifact("index", write, resumes=True)


if __name__ == "__main__":
    sys.exit(main("index"))
