"""solutions of the training split -> states: what the frozen text tower says at each step, once."""

import sys

from jobs.step import Job, main
from medmm_ray.score import inputs, states


def run(job: Job) -> None:
    model, model_id = job.run.model("text_prm"), job.run.model_id("text_prm")
    source, ids = job.solutions_of("train")
    questions, images, evidence = (job.read(name) for name in ("questions", "images", "evidence"))
    job.make(
        "states",
        source,
        ids,
        lambda ds: states(inputs(ds, questions, images, evidence), job.config, model, model_id),
        "question_id",
        "states",
    )


if __name__ == "__main__":
    sys.exit(main("states"))
