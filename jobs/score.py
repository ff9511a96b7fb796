"""solutions of the test split (score.splits) -> scores: each step by each arm."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.score import inputs, score


def run(job: Job) -> None:
    """Score the solutions of the splits in every arm."""
    model, model_id = job.run.model("two_tower"), job.run.model_id("two_tower")
    source, ids = job.solutions_of(*job.config.splits)
    questions, images, evidence = job.read_all(["questions", "images", "evidence"])
    job.make(
        "scores",
        source,
        ids,
        lambda ds: score(inputs(ds, questions, images, evidence, job.config.seed), job.config, model, model_id),
        "question_id",
        "scores",
    )


if __name__ == "__main__":
    sys.exit(main("score"))
