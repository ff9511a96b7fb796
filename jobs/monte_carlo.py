"""solutions + judge_labels -> monte_carlo_labels: continuations of the steps that the judge is unsure of."""

import sys

from jobs.step import Job, main
from medmm_ray.monte_carlo import monte_carlo


def run(job: Job) -> None:
    questions = job.read("questions")
    labels = job.read("judge_labels", ["question_id", "solution_id", "steps"])
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    model, policy = job.run.model("policy"), job.run.model_id("policy")
    source = job.table("solutions").dataset(rows_per_block=job.config.batch_size)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    job.make(
        "monte_carlo_labels",
        source,
        ids,
        lambda ds: monte_carlo(
            ds, job.config, questions=questions, judge_labels=labels, model=model, policy=policy, evidence=evidence
        ),
        "question_id",
        "labels",
    )


if __name__ == "__main__":
    sys.exit(main("monte_carlo"))
