"""states + labels of all sources + images -> two_tower: the multimodal reward model, whole."""

import sys

import pyarrow as pa

from jobs.graph import LABELS
from jobs.step import Job, main
from medmm_ray.stats.targets import describe_consensus
from medmm_ray.train.two_tower import train_two_tower


def run(job: Job) -> None:
    labels = [job.read(name) for name in (*LABELS, "tree_labels")]
    questions, images, evidence = (job.read(name) for name in ("questions", "images", "evidence"))
    text_prm, image_tower = job.run.model("text_prm"), job.run.model("image_tower")
    solved = (job.read(name, ["question_id", "solutions"]) for name in ("solutions", "tree_solutions"))
    solutions = pa.concat_tables(solved)
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
    )
    figures = job.run.artifact("two_tower").manifest().figures
    if job.config.label_policy == "consensus":
        job.note(describe_consensus(figures))


if __name__ == "__main__":
    sys.exit(main("train_two_tower"))
