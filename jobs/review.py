"""solutions + labels -> review_queue and expert_labels."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.records import ReviewItem, from_dict
from medmm_ray.pages.review_page.export import log_uri, read_export, step_labels
from medmm_ray.steps.review import queue, review


def run(job: Job) -> None:
    """Draw the expert's queue, and write the expert's labels of it."""
    questions, images = job.read("questions"), job.read("images")
    judged, rolled_out = job.read("judge_labels"), job.read("monte_carlo_labels")
    solutions = job.read("solutions", ["question_id", "solutions"])
    job.make_rows("review_queue", queue(solutions, questions, judged, rolled_out, job.config), "question_id")
    items = [from_dict(ReviewItem, row) for row in job.read("review_queue").to_pylist()]
    if job.config.expert == "readers":
        # An export is frozen: what readers add later needs a new one, and makes the labels anew.
        verdicts = read_export(log_uri(job.run.root, "steps"), job.config.verdicts)
        labels, figures = step_labels(verdicts, items, questions, solutions)
        job.make_rows("expert_labels", labels, "question_id", figures)
        return
    source = job.table("solutions").dataset(rows_per_block=32)
    job.make(
        "expert_labels",
        source,
        solutions["question_id"].to_pylist(),
        lambda ds: review(ds, job.config, items=items, questions=questions, images=images),
        "question_id",
        "labels",
    )


if __name__ == "__main__":
    sys.exit(main("review"))
