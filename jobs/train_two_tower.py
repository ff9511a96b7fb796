"""states + labels of all sources + images -> two_tower: the multimodal reward model, whole."""

import sys

import pyarrow as pa

from jobs.entry import main
from jobs.graph import ALL_LABELS
from jobs.step import Job
from medmm_ray.stats.targets import describe_consensus
from medmm_ray.train.two_tower import train_two_tower


def run(job: Job) -> None:
    """Train the image part on the states of the text tower; the workers read those by themselves."""
    labels = job.read_all(ALL_LABELS)
    questions = job.read("questions")
    images = job.read("images")
    evidence = job.read("evidence")
    solutions = pa.concat_tables(job.read_all(["solutions", "tree_solutions"], ["question_id", "solutions"]))
    text_prm = job.run.model("text_prm")
    image_tower = job.run.model("image_tower")
    job.make_artifact(
        "two_tower",
        lambda uri: train_two_tower(
            job.config,
            [job.table(name) for name in ("states", "tree_states")],
            labels,
            questions,
            images,
            evidence,
            solutions,
            text_prm,
            image_tower,
            folder=uri,
            name=job.run_name,
        ),
        resumes=True,
    )
    figures = job.run.artifact("two_tower").manifest().figures
    if job.config.label_policy == "consensus":
        job.note(describe_consensus(figures))


if __name__ == "__main__":
    sys.exit(main("train_two_tower"))
