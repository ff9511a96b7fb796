"""solutions + labels -> review_queue and expert_labels."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.records import ReviewItem, from_dict
from medmm_ray.pages.review_page.export import log_uri, read_export, step_labels
from medmm_ray.steps.review import QUESTION_COLUMNS, queue, review


def run(job: Job) -> None:
    """Draw the expert's queue, and write the expert's labels of it."""
    # A queue that is there is not drawn again.
    if not job.table("review_queue").is_complete:
        job.make_rows("review_queue", drawn_queue(job), "question_id")
    items = [from_dict(ReviewItem, row) for row in job.read("review_queue").to_pylist()]
    if job.config.expert == "readers":
        # An export is frozen: what readers add later needs a new one, and makes the labels anew.
        verdicts = read_export(log_uri(job.run.root, "steps"), job.config.verdicts)
        question_ids = [item.question_id for item in items]
        questions = job.rows_where("questions", "question_id", question_ids)
        solutions = job.rows_where("solutions", "question_id", question_ids)
        labels, figures = step_labels(verdicts, items, questions, solutions)
        job.make_rows("expert_labels", labels, "question_id", figures)
        return
    source = job.table("solutions").dataset(rows_per_block=32)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    with job.lookup_folder("expert_labels") as folder:
        job.make(
            "expert_labels",
            source,
            ids,
            lambda ds: review(
                ds,
                job.config,
                items=items,
                questions=job.lookup("questions", QUESTION_COLUMNS, folder),
                annotations=job.lookup("images", ["annotation"], folder, key="image_id"),
            ),
            "question_id",
            "labels",
        )


def drawn_queue(job: Job) -> list[ReviewItem]:
    """The steps that the expert is to read."""
    return queue(
        job.stream("solutions", ["question_id", "solutions"]),
        job.stream("questions", ["question_id", "difficulty", "modality"]),
        job.stream("judge_labels"),
        job.stream("monte_carlo_labels"),
        job.config,
    )


if __name__ == "__main__":
    sys.exit(main("review"))
