"""solutions and tree_solutions of the training split -> states and tree_states: what the frozen text tower says at each
step, once."""

import sys
from functools import cache

from jobs.entry import main
from jobs.score import looked_up
from jobs.step import Job
from medmm_ray.steps.score import InputFiles, inputs, states


def run(job: Job) -> None:
    """Compute the states of sampled solutions and of those in trees; the second where there are trees."""
    model, model_id = job.run.model("text_prm"), job.run.model_id("text_prm")
    # Beside the second table: a complete one keeps nothing of what its tasks looked up.
    with job.lookup_folder("tree_states") as folder:

        @cache
        def files() -> InputFiles:
            return looked_up(job, folder)

        for table, solutions in (("states", "solutions"), ("tree_states", "tree_solutions")):
            if job.run.is_left_out(solutions):
                job.make_rows(table, [], "question_id")
                continue
            source, ids = job.solutions_of("train", table=solutions)
            job.make(
                table,
                source,
                ids,
                lambda ds: states(inputs(ds, files()), job.config, model, model_id),
                "question_id",
                "states",
            )


if __name__ == "__main__":
    sys.exit(main("states"))
