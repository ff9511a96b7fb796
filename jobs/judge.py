"""solutions -> judge_labels: a verdict for each step, with its confidence and reason."""

import sys
from collections import Counter
from collections.abc import Sequence

from jobs.step import Job, main
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.engines.llm.client import api_folder
from medmm_ray.steps.judge import APIS, JudgeConfig, judge


def run(job: Job) -> None:
    tables = {name: job.read(name) for name in ("questions", "images", "evidence")}
    config, folder = job.config, f"{job.run.root}/api"
    judges = [(own, model_of(job, own)) for own in (config, job.recipe.second_judge) if own]
    second = judges[1] if len(judges) > 1 else None
    source = job.table("solutions").dataset(rows_per_block=32)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    job.make(
        "judge_labels",
        source,
        ids,
        lambda ds: judge(ds, config, model=judges[0][1], folder=folder, second=second, **tables),
        "question_id",
        "labels",
    )
    if told := answered_by(job.read("judge_labels", ["answered_by"])["answered_by"].to_pylist()):
        job.note(told)
    for model in dict.fromkeys(model for own, model in judges if own.backend in APIS and model):
        paid = close_ledger(api_folder(folder, model))
        job.note(
            f"${paid.spent:.4f} spent on {paid.answers:,} answers of {model}, ${paid.possibly_paid:.4f} possibly paid "
            f"for {paid.lost_calls:,} calls that were cut off"
        )


def answered_by(models: Sequence[str | None]) -> str:
    """Of labels, by the models that answered, in words; nothing where no API named one."""
    counts = Counter(model for model in models if model)
    named = "; ".join(f"{model} {number:,}" for model, number in counts.most_common())
    return f"labels by the model that answered: {named}" if named else ""


def model_of(job: Job, config: JudgeConfig) -> str | None:
    return job.run.model("policy") if config.model is None and config.backend == "vllm" else config.model


if __name__ == "__main__":
    sys.exit(main("judge"))
