"""raw_questions, raw_images -> questions, images: each once, with splits that share no picture."""

import sys

from jobs.step import Job, main
from medmm_ray.curate import confirm, curate, propose, thumbnails


def run(job: Job) -> None:
    import ray

    questions, images = job.read("raw_questions"), job.read("raw_images")
    proposed, pairs = propose(images, job.config)
    job.waiting = f"pixels of {proposed.num_rows:,} images that may be duplicates"
    details = thumbnails(ray.data.from_arrow(proposed), job.config) if proposed.num_rows else None
    rows = ray.get(details.to_arrow_refs()) if details else []
    agreed = confirm(proposed, pairs, rows, job.config) if rows else []
    final = curate(questions, images, agreed, job.config)
    job.make_rows("images", final.images, "image_id")
    job.make_rows("questions", final.questions, "question_id", final.figures)


if __name__ == "__main__":
    sys.exit(main("curate"))
