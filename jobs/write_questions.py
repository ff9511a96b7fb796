"""raw_images without a question -> written_questions: by a model that sees them, checked; new_questions to review."""

import sys
from collections.abc import Mapping

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.write_questions import REFUSALS, usable, without_question, write_questions


def run(job: Job) -> None:
    """Make written_questions, and new_questions of those that are usable."""
    import ray

    images = without_question(job.read("raw_images"), job.read("raw_questions"), job.config)
    if images.num_rows:
        source = ray.data.from_arrow(images).repartition(target_num_rows_per_block=job.config.engine.batch_size)
        job.make(
            "written_questions",
            source,
            images["image_id"].to_pylist(),
            lambda ds: write_questions(ds, job.config, apis=job.run.apis),
            "image_id",
            "questions",
        )
        job.note(summary(job.table("written_questions").manifest().figures))
    else:
        job.make_rows("written_questions", [], "written_id")
    job.make_rows("new_questions", usable(job.read("written_questions"), images), "question_id")


def summary(figures: Mapping[str, float]) -> str:
    """A table's figures in words."""
    refused = {kind: int(figures[f"refused_{kind}"]) for kind in REFUSALS}
    reasons = ", ".join(f"{kind} {number}" for kind, number in refused.items() if number)
    refusals = f"{sum(refused.values()):,} refused" + (f" ({reasons})" if reasons else "")
    return f"{figures['written']:,.0f} written, {refusals}, {figures['failed']:,.0f} failed"


if __name__ == "__main__":
    sys.exit(main("write_questions"))
