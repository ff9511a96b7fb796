"""raw_questions, raw_images -> questions, images: each once, with splits that share no picture."""

import sys

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job, Run
from medmm_ray.data.records import QuestionReview
from medmm_ray.data.tables import Table
from medmm_ray.steps.curate import confirm, curate, propose, reviewed, thumbnails


def run(job: Job) -> None:
    """Take written questions in, find near duplicates, and write what stays."""
    import ray

    images = job.read("raw_images")
    reviews = review_table(job.run, job.config.reviews).to_arrow() if job.config.reviews else None
    questions = reviewed(job.read("raw_questions"), job.read("new_questions"), reviews, job.config)
    proposed, pairs = propose(images, job.config)
    job.waiting = f"pixels of {proposed.num_rows:,} images that may be duplicates"
    duplicates = []
    if proposed.num_rows:
        blocks = ray.get(thumbnails(ray.data.from_arrow(proposed), job.config).to_arrow_refs())
        # An empty block has no columns: it would not fit the others.
        details = pa.concat_tables(block for block in blocks if block.num_rows)
        duplicates = confirm(proposed, pairs, details, job.config)
    final = curate(questions, images, duplicates, job.config)
    for note in final.notes:
        job.note(note)
    job.make_rows("images", final.images, "image_id")
    job.make_rows("questions", final.questions, "question_id", final.figures)


def review_table(run: Run, name: str) -> Table:
    """What readers said of questions, by the name of its export."""
    return Table(f"{run.root}/question_reviews/{name}", QuestionReview)


if __name__ == "__main__":
    sys.exit(main("curate"))
