"""solutions + judge_labels -> monte_carlo_labels: continuations of steps, by the mode that the recipe names."""

import operator
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from jobs.entry import main
from jobs.sample import count, graded
from jobs.step import Job
from medmm_ray.config import ConfigError
from medmm_ray.data.sorted_rows import SortedRows, listed_rows, sort_rows, windows, write_sorted
from medmm_ray.steps.monte_carlo import QUESTION_COLUMNS, image_uris, judged_rows, monte_carlo

if TYPE_CHECKING:
    from ray.data import Dataset

JUDGE_COLUMNS = ["question_id", "solution_id", "annotator", "steps", "error"]
# Settings that decide how the policy is sampled, here and in the section sample.
SAMPLING_SETTINGS = (
    *("temperature", "top_k", "top_p", "num_documents"),
    *("engine.num_images", "engine.lora", "engine.dtype", "engine.vllm"),
)


def run(job: Job) -> None:
    """Make monte_carlo_labels, and note their figures."""
    check_sampling(job)
    model, policy = job.run.model("policy"), job.run.policy_id(job.step)
    source = job.table("solutions").dataset(rows_per_block=job.config.engine.batch_size)
    ids = job.read("solutions", ["question_id"])["question_id"].to_pylist()
    with job.lookup_folder("monte_carlo_labels") as folder:

        def continued(ds: "Dataset") -> "Dataset":
            tables = lookups(job, folder)
            return monte_carlo(
                ds,
                job.config,
                questions=tables.questions,
                judged=tables.judged,
                model=model,
                policy=policy,
                evidence=tables.evidence,
                uris=tables.uris,
                equivalence=job.recipe.sample.equivalence,
                apis=job.run.apis,
            )

        job.make("monte_carlo_labels", source, ids, continued, "question_id", "labels")
    if figures := job.table("monte_carlo_labels").manifest().figures:
        job.note(summary(figures))


class Lookups(NamedTuple):
    """What a task looks up for its solutions: the tables of `monte_carlo`."""

    questions: SortedRows
    judged: SortedRows
    evidence: SortedRows | None
    uris: SortedRows | None


def lookups(job: Job, folder: str) -> Lookups:
    """The tables that tasks read, in files in `folder`."""
    config = job.config
    return Lookups(
        questions=job.lookup("questions", QUESTION_COLUMNS, folder),
        judged=judged_rows(job.stream("judge_labels", JUDGE_COLUMNS), folder),
        evidence=job.lookup("evidence", ["documents"], folder) if config.num_documents else None,
        uris=_uris(job, config.engine.num_images, folder) if config.engine.num_images else None,
    )


def _uris(job: Job, num_images: int, folder: str) -> SortedRows:
    """The pictures of each question."""
    columns = ["question_id", "image_ids"]
    schema = pa.schema([job.table("questions").schema.field(name) for name in columns])
    questions = sort_rows(job.stream("questions", columns), "question_id", schema, f"{folder}/image_ids")
    images = listed_rows(
        questions,
        "image_ids",
        job.lookup("images", ["uri"], folder, key="image_id"),
        f"{folder}/question_images",
    )
    tables = windows({"questions": questions, "images": images})
    parts = (image_uris(window["questions"], window["images"], num_images) for window in tables)
    uris = pa.schema({"question_id": pa.string(), "image_uris": pa.list_(pa.string())})
    return write_sorted(parts, "question_id", uris, f"{folder}/uris")


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
