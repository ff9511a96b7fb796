"""solutions of the test split (score.splits) -> scores: each step by each arm."""

import sys
from typing import TYPE_CHECKING

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.score import InputFiles, input_files, inputs, score
from medmm_ray.steps.score.joining import EVIDENCE_COLUMNS, IMAGE_COLUMNS, QUESTION_COLUMNS

if TYPE_CHECKING:
    from ray.data import Dataset


def run(job: Job) -> None:
    """Score the solutions of the splits in every arm."""
    model, model_id = job.run.model("two_tower"), job.run.model_id("two_tower")
    source, ids = job.solutions_of(*job.config.splits)
    with job.lookup_folder("scores") as folder:

        def scored(ds: "Dataset") -> "Dataset":
            files = looked_up(job, folder, job.config.seed)
            return score(inputs(ds, files), job.config, model, model_id)

        job.make("scores", source, ids, scored, "question_id", "scores")


def looked_up(job: Job, folder: str, seed: int = 0) -> InputFiles:
    """What the run's tables say of each question, in files in `folder`."""
    return input_files(
        job.stream("questions", QUESTION_COLUMNS),
        job.stream("images", IMAGE_COLUMNS),
        job.stream("evidence", EVIDENCE_COLUMNS),
        folder,
        seed,
    )


if __name__ == "__main__":
    sys.exit(main("score"))
