"""questions, demonstrations, documents -> policy: a checkpoint that writes solutions."""

import sys

from jobs.step import Job, main
from medmm_ray.train.policy import train_policy


def run(job: Job) -> None:
    questions, demonstrations, documents = (job.read(n) for n in ("questions", "demonstrations", "documents"))
    job.make_artifact(
        "policy", lambda uri: train_policy(job.config, questions, demonstrations, documents, uri, job.run_name)
    )


if __name__ == "__main__":
    sys.exit(main("train_policy"))
