"""solutions -> judge_labels: a verdict for each step, with its confidence and reason."""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.sorted_rows import SortedRows
from medmm_ray.engines.llm.access import api_folder
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.steps.judge import (
    EVIDENCE_COLUMNS,
    IMAGE_COLUMNS,
    QUESTION_COLUMNS,
    JudgeApi,
    JudgeConfig,
    JudgeVllm,
    PhantomEngine,
    judge,
)

if TYPE_CHECKING:
    from ray.data import Dataset


def run(job: Job) -> None:
    """Make judge_labels, and note which models answered and what they cost."""
    config, apis = job.config, job.run.apis
    model = model_of(job, config)
    judges = [(config, model)]
    if job.recipe.second_judge:
        judges.append((job.recipe.second_judge, model_of(job, job.recipe.second_judge)))
    second = judges[1] if len(judges) > 1 else None
    with job.lookup_folder("judge_labels") as folder:
        tables = cache(lookups)  # of what is judged while it is sampled, and of the rest

        def judged(ds: "Dataset") -> "Dataset":
            return judge(ds, config, model=model, apis=apis, second=second, **tables(job, folder)._asdict())

        job.make_of_each("judge_labels", "solutions", judged, "question_id", "labels")
    if models_note := answered_by(job.stream("judge_labels", ["answered_by"])):
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


class Lookups(NamedTuple):
    """What a task looks up for its solutions: the tables of `judge`."""

    questions: SortedRows
    images: SortedRows
    evidence: SortedRows


def lookups(job: Job, folder: str) -> Lookups:
    """The tables that tasks and actors read, in files in `folder`."""
    return Lookups(
        questions=job.lookup("questions", QUESTION_COLUMNS, folder),
        images=job.lookup("images", IMAGE_COLUMNS, folder, key="image_id"),
        evidence=job.lookup("evidence", EVIDENCE_COLUMNS, folder),
    )


def answered_by(labels: Iterable[pa.Table]) -> str:
    """How many labels each model answered, in words; nothing where no API named one. `labels` come in parts."""
    counts: Counter[str] = Counter()
    for part in labels:
        counts.update(filter(None, part["answered_by"].to_pylist()))
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
