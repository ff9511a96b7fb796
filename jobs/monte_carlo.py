"""solutions + judge_labels -> monte_carlo_labels: continuations of steps, by the mode that the recipe names."""

import operator
import sys
from collections.abc import Mapping

from jobs.entry import main
from jobs.sample import count, graded
from jobs.step import Job
from medmm_ray.config import ConfigError
from medmm_ray.steps.monte_carlo import monte_carlo

# Settings that decide how the policy is sampled, here and in the section sample.
SAMPLING_SETTINGS = (
    *("temperature", "top_k", "top_p", "num_documents"),
    *("engine.num_images", "engine.lora", "engine.dtype", "engine.vllm"),
)


def run(job: Job) -> None:
    """Make monte_carlo_labels, and note their figures."""
    check_sampling(job)
    questions = job.read("questions")
    labels = job.read("judge_labels", ["question_id", "solution_id", "annotator", "steps", "error"])
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    images = job.read("images", ["image_id", "uri"]) if job.config.engine.num_images else None
    model, policy = job.run.model("policy"), job.run.policy_id(job.step)
    source = job.table("solutions").dataset(rows_per_block=job.config.engine.batch_size)
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
            apis=job.run.apis,
        ),
        "question_id",
        "labels",
    )
    if figures := job.table("monte_carlo_labels").manifest().figures:
        job.note(summary(figures))


def summary(figures: Mapping[str, float]) -> str:
    """A table's figures in words."""
    prompt_tokens = count(figures, "prompt_tokens")
    rollouts, prefixes = count(figures, "rollouts"), count(figures, "prefixes_continued")
    parts = [
        f"{count(figures, 'steps_labelled'):,} steps labelled",
        f"{count(figures, 'steps_known_free'):,} of them free; {rollouts:,} continuations of {prefixes:,} prefixes",
        f"{count(figures, 'rollout_tokens'):,} tokens",
        f"{count(figures, 'failed_rollouts'):,} failed",
        f"{count(figures, 'prefixes_failed'):,} prefixes could not be continued",
    ]
    if prompt_tokens:
        parts.append(f"{figures['cached_tokens'] / prompt_tokens:.1%} of prompt tokens cached")
    return ", ".join([*parts, *graded(figures)])


def check_sampling(job: Job) -> None:
    """Raise ConfigError where solutions would be counted that were sampled in another way than continuations are."""
    if not job.config.counts_solutions:
        return
    for name in SAMPLING_SETTINGS:
        setting = operator.attrgetter(name)
        value, sample_value = setting(job.config), setting(job.recipe.sample)
        if value != sample_value:
            raise ConfigError(
                f"monte_carlo.{name} is {value} and sample.{name} {sample_value}: solutions and continuations are "
                "sampled differently and cannot be counted together. Make them equal, or set "
                "monte_carlo.count_solutions=false"
            )


if __name__ == "__main__":
    sys.exit(main("monte_carlo"))
