"""raw_questions, raw_images -> questions, images: each once, with splits that share no picture."""

import sys

import pyarrow as pa

from jobs.step import Job, main
from medmm_ray.curate import confirm, curate, propose, thumbnails


def run(job: Job) -> None:
    import ray

    questions, images = job.read("raw_questions"), job.read("raw_images")
    proposed, pairs = propose(images, job.config)
    job.waiting = f"pixels of {proposed.num_rows:,} images that may be duplicates"
    agreed = []
    if proposed.num_rows:
        blocks = ray.get(thumbnails(ray.data.from_arrow(proposed), job.config).to_arrow_refs())
        agreed = confirm(proposed, pairs, pa.concat_tables(b for b in blocks if b.num_rows), job.config)
    final = curate(questions, images, agreed, job.config)
    job.make_rows("images", final.images, "image_id")
    job.make_rows("questions", final.questions, "question_id", final.figures)


if __name__ == "__main__":
    sys.exit(main("curate"))
