"""solutions -> judge_labels: a verdict for each step, with its confidence and reason."""

import sys

from jobs.step import Job, main
from medmm_ray.judge import judge


def run(job: Job) -> None:
    tables = {name: job.read(name) for name in ("questions", "images", "evidence")}
    model = job.config.model
    if model is None and job.config.backend == "vllm":
        model = job.run.model("policy")
    source = job.table("solutions").dataset(rows_per_block=32)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    folder = f"{job.run.root}/api"
    job.make(
        "judge_labels",
        source,
        ids,
        lambda ds: judge(ds, job.config, model=model, folder=folder, **tables),
        "question_id",
        "labels",
    )


if __name__ == "__main__":
    sys.exit(main("judge"))
