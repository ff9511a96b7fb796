"""solutions + labels of all sources -> text_prm: the text reward model, from the policy's weights or another's."""

import sys

import pyarrow as pa

from jobs.entry import main
from jobs.graph import ALL_LABELS
from jobs.step import Job
from medmm_ray.stats.targets import describe_consensus
from medmm_ray.train.text_prm import train_text_prm


def run(job: Job) -> None:
    """Train on the labels of all sources, of sampled solutions and of those that search trees found."""
    questions = job.read("questions")
    evidence = job.read("evidence")
    solutions = pa.concat_tables(job.read_all(["solutions", "tree_solutions"]))
    labels = job.read_all(ALL_LABELS)
    base = job.config.base or job.run.model("policy")
    job.make_artifact(
        "text_prm",
        lambda uri: train_text_prm(
            job.config, questions, evidence, solutions, labels, base, folder=uri, name=job.run_name
        ),
        resumes=True,
    )
    figures = job.run.artifact("text_prm").manifest().figures
    if job.config.label_policy == "consensus":
        job.note(describe_consensus(figures))


if __name__ == "__main__":
    sys.exit(main("train_text_prm"))
