"""questions, demonstrations, documents -> policy: a checkpoint that writes solutions."""

import sys

from jobs.entry import main
from jobs.step import Job
from medmm_ray.train.policy import train_policy


def run(job: Job) -> None:
    """Train on the worked solutions of training questions; the documents' words are in the tokenizer too."""
    questions = job.read("questions")
    demonstrations = job.read("demonstrations")
    documents = job.read("documents")
    job.make_artifact(
        "policy",
        lambda uri: train_policy(job.config, questions, demonstrations, documents, uri, job.run_name),
        resumes=True,
    )


if __name__ == "__main__":
    sys.exit(main("train_policy"))
