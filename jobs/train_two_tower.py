"""states + labels of all sources + images -> two_tower: the multimodal reward model, whole."""

import sys

from jobs.entry import main
from jobs.graph import ALL_LABELS
from jobs.step import Job
from medmm_ray.stats.targets import describe_consensus
from medmm_ray.train.two_tower import train_two_tower


def run(job: Job) -> None:
    """Train the image part on the states of the text tower; the workers read those by themselves."""
    text_prm = job.run.model("text_prm")
    image_tower = job.run.model("image_tower")
    job.make_artifact(
        "two_tower",
        lambda uri: train_two_tower(
            job.config,
            [job.table(name) for name in ("states", "tree_states")],
            labels=job.stream_all(ALL_LABELS),
            questions=job.stream("questions"),
            images=job.stream("images"),
            evidence=job.stream("evidence", ["question_id", "images", "error"]),
            solutions=job.stream_all(["solutions", "tree_solutions"], ["question_id", "solutions"]),
            text_prm=text_prm,
            image_tower=image_tower,
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
