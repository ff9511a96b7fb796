"""The sources -> raw_questions, raw_images, documents, demonstrations; ``--check`` reports on the first rows."""

import sys
import tempfile
from collections.abc import Sequence

from jobs.entry import guarded, main
from jobs.recipe import Recipe
from jobs.step import Job, load_recipe
from medmm_ray.steps.ingest import (
    demonstration_rows,
    document_rows,
    drawings_of,
    image_table,
    inspect_images,
    question_rows,
    read_sources,
)
from medmm_ray.steps.ingest.check import check as check_sources


def run(job: Job) -> None:
    """Read the sources, inspect their images, and write their questions, documents and worked solutions."""
    import ray

    job.waiting = f"source {', '.join(job.config.names)}"
    sources = read_sources(job.config)
    folder = f"{job.table('raw_images').uri}/files"
    images = image_table(sources, folder)
    drawings = drawings_of(sources)
    # Small blocks, so that drawing and hashing spread over all workers.
    source = ray.data.from_arrow(images).repartition(target_num_rows_per_block=256)
    job.make(
        "raw_images", source, images["uri"].to_pylist(), lambda ds: inspect_images(ds, job.config, drawings), "uri"
    )
    # A question's id contains the hashes of its images: they must be there first.
    rows = question_rows(sources, job.read("raw_images"), folder)
    job.make_rows("raw_questions", rows, "question_id")
    job.make_rows("documents", document_rows(sources, job.config), "document_id")
    job.make_rows("demonstrations", demonstration_rows(sources, rows, job.config), "question_id")


def check(recipe: Recipe) -> int:
    """Print what the first rows of each source are, and which of them fail why; 0, an exit code."""
    with tempfile.TemporaryDirectory() as folder:
        for line in check_sources(recipe.ingest, folder):
            print(line)
    return 0


def _main(words: Sequence[str]) -> int:
    if "--check" not in words:
        return main("ingest", words)
    rest = list(words)
    rest.remove("--check")
    return guarded(lambda: check(load_recipe(rest, "ingest")))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
