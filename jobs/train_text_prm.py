"""solutions + labels of all sources -> text_prm: the text reward model, from the policy's weights or another's."""

import sys

from jobs.entry import main
from jobs.graph import ALL_LABELS
from jobs.step import Job
from medmm_ray.stats.targets import describe_consensus
from medmm_ray.train.text_prm import train_text_prm


def run(job: Job) -> None:
    """Train on the labels of all sources, of sampled solutions and of those that search trees found."""
    base = job.config.base or job.run.model("policy")
    job.make_artifact(
        "text_prm",
        lambda uri: train_text_prm(
            job.config,
            questions=job.stream("questions"),
            evidence=job.stream("evidence", ["question_id", "documents", "error"]),
            solutions=job.stream_all(["solutions", "tree_solutions"], ["question_id", "solutions", "error"]),
            labels=job.stream_all(ALL_LABELS),
            base=base,
            folder=uri,
            name=job.run_name,
        ),
        resumes=True,
    )
    figures = job.run.artifact("text_prm").manifest().figures
    if job.config.label_policy == "consensus":
        job.note(describe_consensus(figures))


if __name__ == "__main__":
    sys.exit(main("train_text_prm"))
