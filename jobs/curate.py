"""raw_questions, raw_images -> questions, images: each once, with splits that share no picture."""

import sys
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job, Run
from medmm_ray.data.records import QuestionReview
from medmm_ray.data.tables import Table
from medmm_ray.steps.curate import confirm, curate, propose, reviewed, thumbnails
from medmm_ray.steps.curate.altered import compare, confirmed, describe, propose_altered, to_describe

if TYPE_CHECKING:
    from ray.data import Dataset


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
        details = _collected(thumbnails(ray.data.from_arrow(proposed), job.config))
        duplicates = confirm(proposed, pairs, details, job.config)
    if job.config.altered_pictures:
        duplicates += altered_pairs(job, images)
    final = curate(questions, images, duplicates, job.config)
    for note in final.notes:
        job.note(note)
    job.make_rows("images", final.images, "image_id")
    job.make_rows("questions", final.questions, "question_id", final.figures)


def altered_pairs(job: Job, images: pa.Table) -> list[tuple[str, str]]:
    """Pairs of images that are one picture, cropped, turned, inverted or with a border."""
    from ray.data import from_arrow

    described = to_describe(images)
    if described.num_rows < 2:
        return []
    job.waiting = f"descriptors of {described.num_rows:,} images"
    descriptors = _collected(describe(from_arrow(described), job.config))
    pairs = propose_altered(described, descriptors)
    if not pairs.num_rows:
        return []
    job.waiting = f"alignment of {pairs.num_rows:,} pairs of images that may be one picture, altered"
    # Small blocks: a pair takes some hundredths of a second.
    rows = from_arrow(pairs).repartition(target_num_rows_per_block=256)
    return confirmed(_collected(compare(rows, job.config)), job.config)


def _collected(ds: "Dataset") -> pa.Table:
    """All rows of a data set; an empty block has no columns, and would not fit the others."""
    import ray

    blocks = ray.get(ds.to_arrow_refs())
    return pa.concat_tables(block for block in blocks if block.num_rows)


def review_table(run: Run, name: str) -> Table:
    """What readers said of questions, by the name of its export."""
    return Table(f"{run.root}/question_reviews/{name}", QuestionReview)


if __name__ == "__main__":
    sys.exit(main("curate"))
