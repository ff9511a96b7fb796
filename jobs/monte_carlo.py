"""solutions + judge_labels -> monte_carlo_labels: continuations of steps, by the mode that the recipe names."""

import sys

from jobs.step import Job, main
from medmm_ray.config import ConfigError
from medmm_ray.monte_carlo import monte_carlo

DRAWS = ("temperature", "top_k", "top_p", "num_documents", "num_images")


def run(job: Job) -> None:
    check_draws(job)
    questions = job.read("questions")
    labels = job.read("judge_labels", ["question_id", "solution_id", "annotator", "steps", "error"])
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    images = job.read("images", ["image_id", "uri"]) if job.config.num_images else None
    model, policy = job.run.model("policy"), job.run.model_id("policy")
    source = job.table("solutions").dataset(rows_per_block=job.config.batch_size)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    job.make(
        "monte_carlo_labels",
        source,
        ids,
        lambda ds: monte_carlo(
            ds,
            job.config,
            questions=questions,
            judge_labels=labels,
            model=model,
            policy=policy,
            evidence=evidence,
            images=images,
            equivalence=job.recipe.sample.equivalence,
            folder=f"{job.run.root}/api",
        ),
        "question_id",
        "labels",
    )


def check_draws(job: Job) -> None:
    """Raise ConfigError where solutions would be counted that were drawn in another way than continuations are."""
    if not job.config.counts_solutions:
        return
    for name in DRAWS:
        own, other = job.config.model_dump()[name], job.recipe.sample.model_dump()[name]
        if own != other:
            raise ConfigError(
                f"monte_carlo.{name} is {own} and sample.{name} {other}: solutions and continuations are drawn "
                "differently and cannot be counted together. Make them equal, or set monte_carlo.count_solutions=false"
            )


if __name__ == "__main__":
    sys.exit(main("monte_carlo"))
