"""solutions -> judge_labels: a verdict for each step, with its confidence and reason."""

import sys
from collections import Counter
from collections.abc import Sequence

from jobs.entry import main
from jobs.step import Job
from medmm_ray.engines.llm.access import api_folder
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine, judge


def run(job: Job) -> None:
    """Make judge_labels, and note which models answered and what they cost."""
    tables = {name: job.read(name) for name in ("questions", "images", "evidence")}
    config, apis = job.config, job.run.apis
    model = model_of(job, config)
    judges = [(config, model)]
    if job.recipe.second_judge:
        judges.append((job.recipe.second_judge, model_of(job, job.recipe.second_judge)))
    second = judges[1] if len(judges) > 1 else None
    job.make_of_each(
        "judge_labels",
        "solutions",
        lambda ds: judge(ds, config, model=model, apis=apis, second=second, **tables),
        "question_id",
        "labels",
    )
    if models_note := answered_by(job.read("judge_labels", ["answered_by"])["answered_by"].to_pylist()):
        job.note(models_note)
    # Two judges of one model share a ledger.
    api_models = dict.fromkeys(
        name for judge_config, name in judges if isinstance(judge_config.engine, JudgeApi) and name
    )
    for name in api_models:
        paid = close_ledger(api_folder(apis.folder, name))
        job.note(
            f"${paid.spent:.4f} spent on {paid.answers:,} answers of {name}, ${paid.possibly_paid:.4f} possibly paid "
            f"for {paid.lost_calls:,} calls that were cut off"
        )


def answered_by(models: Sequence[str | None]) -> str:
    """How many labels each model answered, in words; nothing where no API named one."""
    counts = Counter(model for model in models if model)
    if not counts:
        return ""
    shares = [f"{model} {number:,}" for model, number in counts.most_common()]
    return f"labels by the model that answered: {'; '.join(shares)}"


def model_of(job: Job, config: JudgeConfig) -> str | None:
    """The judge's model; the run's own policy for a local judge that names none."""
    engine = config.engine
    if isinstance(engine, PhantomEngine):
        return None
    if isinstance(engine, JudgeVllm) and engine.model is None:
        return job.run.model("policy")
    return engine.model


if __name__ == "__main__":
    sys.exit(main("judge"))
