"""solutions and tree_solutions of the training split -> states and tree_states: what the frozen text tower says at each
step, once."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.score import inputs, states


def run(job: Job) -> None:
    """Compute the states of sampled solutions and of those in trees; the second where there are trees."""
    model, model_id = job.run.model("text_prm"), job.run.model_id("text_prm")
    questions, images, evidence = job.read_all(["questions", "images", "evidence"])
    for table, solutions in (("states", "solutions"), ("tree_states", "tree_solutions")):
        if job.run.is_left_out(solutions):
            job.make_rows(table, [], "question_id")
            continue
        source, ids = job.solutions_of("train", table=solutions)
        job.make(
            table,
            source,
            ids,
            lambda ds: states(inputs(ds, questions, images, evidence), job.config, model, model_id),
            "question_id",
            "states",
        )


if __name__ == "__main__":
    sys.exit(main("states"))
