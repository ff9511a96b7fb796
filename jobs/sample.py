"""questions, evidence -> solutions: 16 a training question, 64 a test question, by vLLM."""

import logging
import sys

from jobs.step import Job, main
from medmm_ray.sample import sample, summary
from medmm_ray.tables import Table

log = logging.getLogger("medmm_ray")


def run(job: Job) -> None:
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    images = job.read("images", ["image_id", "uri"]) if job.config.num_images else None
    source = job.table("questions").dataset(rows_per_block=job.config.batch_size)
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    model, policy, config_hash = job.run.model("policy"), job.run.model_id("policy"), job.run.fingerprint(job.step)
    job.make(
        "solutions",
        source,
        ids,
        lambda ds: sample(
            ds,
            job.config,
            model=model,
            policy=policy,
            config_hash=config_hash,
            evidence=evidence,
            images=images,
            folder=f"{job.run.root}/api",
        ),
        "question_id",
        figures=told,
    )


def told(table: Table) -> dict[str, float]:
    """The table's figures, which are logged too."""
    figures = summary(table)
    log.info("sample: %s", ", ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    return figures


if __name__ == "__main__":
    sys.exit(main("sample"))
