"""questions, evidence -> solutions: 16 a training question, 64 a test question, by vLLM."""

import sys
from collections.abc import Mapping

from jobs.step import Job, main
from medmm_ray.steps.sample import sample
from medmm_ray.text.quality import FAULTS


def run(job: Job) -> None:
    evidence = job.read("evidence", ["question_id", "documents"]) if job.config.num_documents else None
    images = job.read("images", ["image_id", "uri"]) if job.config.num_images else None
    source = job.table("questions").dataset(rows_per_block=job.config.batch_size)
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    model, policy, config_hash = job.run.model("policy"), job.run.policy_id(job.step), job.run.fingerprint(job.step)
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
    )
    job.note(summary(job.table("solutions").manifest().figures))


def summary(figures: Mapping[str, float]) -> str:
    """A table's figures in words."""
    refused = {kind: int(figures.get(f"rejected_{kind}", 0)) for kind in FAULTS}
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in refused.items() if number)
    drawn, wanted, missing, unfilled, cacheable, shown, left_out = (
        int(figures.get(name, 0))
        for name in (
            "samples_drawn", "samples_requested", "samples_missing", "unfilled_questions", "cacheable_tokens",
            "documents_shown", "documents_left_out",
        )
    )  # fmt: skip
    told = f"{drawn:,} samples drawn for {wanted:,}, {sum(refused.values()):,} refused{f' ({kinds})' if kinds else ''}"
    told += f", {missing:,} missing, {unfilled:,} questions not filled"
    told += f", {figures['cached_tokens'] / cacheable:.1%} of cacheable tokens cached" if cacheable else ""
    told += f", {left_out:,} of {shown + left_out:,} documents left out for want of room" if left_out else ""
    return told + graded(figures)


def graded(figures: Mapping[str, float]) -> str:
    """Of the answers that a model was asked to grade; nothing where there were none."""
    asked, unanswered = (int(figures.get(f"answers_{name}", 0)) for name in ("asked", "unanswered"))
    return f", {asked:,} answers put to a model, {unanswered:,} of them without a verdict" if asked else ""


if __name__ == "__main__":
    sys.exit(main("sample"))
