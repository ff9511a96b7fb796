"""solutions + judge_labels -> monte_carlo_labels: continuations of steps, by the mode that the recipe names."""

import sys
from collections.abc import Mapping

from jobs.sample import graded
from jobs.step import Job, main
from medmm_ray.config import ConfigError
from medmm_ray.steps.monte_carlo import monte_carlo

DRAWS = ("temperature", "top_k", "top_p", "num_documents", "num_images", "lora", "dtype", "vllm")


def run(job: Job) -> None:
    check_draws(job)
    questions = job.read("questions")
    labels = job.read("judge_labels", ["question_id", "solution_id", "annotator", "steps", "error"])
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    images = job.read("images", ["image_id", "uri"]) if job.config.num_images else None
    model, policy = job.run.model("policy"), job.run.policy_id(job.step)
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
    if figures := job.table("monte_carlo_labels").manifest().figures:
        job.note(summary(figures))


def summary(figures: Mapping[str, float]) -> str:
    """A table's figures in words."""
    rollouts, prefixes, tokens, failed, broken, labelled, free, asked = (
        int(figures.get(name, 0))
        for name in ("rollouts", "prefixes_continued", "rollout_tokens", "failed_rollouts", "prefixes_failed",
                     "steps_labelled", "steps_known_free", "prompt_tokens")
    )  # fmt: skip
    told = f"{labelled:,} steps labelled, {free:,} of them free; {rollouts:,} continuations of {prefixes:,} prefixes"
    told += f", {tokens:,} tokens, {failed:,} failed, {broken:,} prefixes could not be continued"
    told += f", {figures['cached_tokens'] / asked:.1%} of prompt tokens cached" if asked else ""
    return told + graded(figures)


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
