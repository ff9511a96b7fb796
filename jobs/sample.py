"""questions, evidence -> solutions: 16 a training question, 64 a test question."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.sample import sample
from medmm_ray.text.quality import FAULTS

if TYPE_CHECKING:
    from ray.data import Dataset


def run(job: Job) -> None:
    """Make solutions, and note their figures."""
    source = job.table("questions").dataset(rows_per_block=job.config.engine.batch_size)
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    model, policy, config_hash = job.run.model("policy"), job.run.policy_id(job.step), job.run.fingerprint(job.step)
    with job.lookup_folder("solutions") as folder:

        def sampled(ds: "Dataset") -> "Dataset":
            has_images = job.config.engine.num_images > 0
            return sample(
                ds,
                job.config,
                model=model,
                policy=policy,
                config_hash=config_hash,
                evidence=job.lookup("evidence", ["documents"], folder) if job.config.num_documents else None,
                images=job.lookup("images", ["uri"], folder, key="image_id") if has_images else None,
                apis=job.run.apis,
            )

        job.make("solutions", source, ids, sampled, "question_id")
    job.note(summary(job.table("solutions").manifest().figures))


def summary(figures: Mapping[str, float]) -> str:
    """A table's figures in words."""
    refused = {kind: int(figures.get(f"rejected_{kind}", 0)) for kind in FAULTS}
    reasons = ", ".join(f"{kind} {number:,}" for kind, number in refused.items() if number)
    cacheable = count(figures, "cacheable_tokens")
    documents, left_out = count(figures, "documents_shown"), count(figures, "documents_left_out")
    parts = [
        f"{count(figures, 'samples_drawn'):,} samples for {count(figures, 'samples_requested'):,} solutions",
        f"{sum(refused.values()):,} refused" + (f" ({reasons})" if reasons else ""),
        f"{count(figures, 'samples_missing'):,} missing",
        f"{count(figures, 'unfilled_questions'):,} questions not filled",
    ]
    if cacheable:
        parts.append(f"{figures['cached_tokens'] / cacheable:.1%} of cacheable tokens cached")
    if left_out:
        parts.append(f"{left_out:,} of {documents + left_out:,} documents left out for want of room")
    return ", ".join([*parts, *graded(figures)])


def graded(figures: Mapping[str, float]) -> list[str]:
    """How many answers a model was asked to grade, in words; nothing where there were none."""
    num_asked, unanswered = count(figures, "answers_asked"), count(figures, "answers_unanswered")
    if not num_asked:
        return []
    return [f"{num_asked:,} answers put to a model, {unanswered:,} of them without a verdict"]


def count(figures: Mapping[str, float], name: str) -> int:
    """A figure that counts something; 0 where the table has none of it."""
    return int(figures.get(name, 0))


if __name__ == "__main__":
    sys.exit(main("sample"))
