"""images, documents, questions -> image_vectors, passages, queries."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.records import Solutions
from medmm_ray.data.sorted_rows import SortedRows, sort_rows
from medmm_ray.data.tables import Table, attach, follow
from medmm_ray.steps.embed import embed_documents, embed_images, embed_questions

if TYPE_CHECKING:
    from ray.data import Dataset

TRACES = pa.schema({"question_id": pa.string(), "trace": pa.string()})


def run(job: Job) -> None:
    """Make the vectors of images, of documents' passages and of questions' queries."""
    tower = job.run.model("image_tower")
    # Blocks of a few batches, so that a lost actor costs little; of images they hold whole pictures on the way.
    images = job.table("images").dataset(rows_per_block=2 * job.config.image_batch_size)
    embed = {
        name: partial(step, config=job.config, image_tower=tower)
        for name, step in (("images", embed_images), ("documents", embed_documents), ("questions", embed_questions))
    }
    ids = job.read("images", ["image_id"])["image_id"].to_pylist()
    job.make(
        "image_vectors",
        images,
        ids,
        embed["images"],
        "image_id",
        output_key="item_id",
    )
    documents = job.table("documents").dataset(rows_per_block=256)
    ids = job.read("documents", ["document_id"])["document_id"].to_pylist()
    job.make(
        "passages",
        documents,
        ids,
        embed["documents"],
        "document_id",
        explode="passages",
    )
    ids = job.read("questions", ["question_id"])["question_id"].to_pylist()
    with ExitStack() as stack:
        questions = _with_traces(
            job,
            job.table("questions").dataset(rows_per_block=256),
            stack,
        )
        job.make("queries", questions, ids, embed["questions"], "question_id")


def _with_traces(
    job: Job,
    questions: "Dataset",
    stack: ExitStack,
) -> "Dataset":
    """The questions, with the first solution that the table of `embed.traces` has of each as `trace`."""
    if job.config.traces is None or job.table("queries").is_complete:
        return questions
    folder = stack.enter_context(job.lookup_folder("queries"))
    rows: SortedRows = sort_rows(
        first_solutions(Table(follow(job.config.traces), Solutions)), "question_id", TRACES, folder + "/traces"
    )
    return attach(questions, rows, "question_id", ["trace"])


def first_solutions(solutions: Table) -> Iterator[pa.Table]:
    """The text of each question's first solution as its trace, part by part; raises where the table is not complete."""
    solutions.manifest()  # raises where it is not complete
    for part in solutions.stream(["question_id", "solutions"]):
        rows = []
        for row in part.to_pylist():
            texts = [solution["text"] for solution in row["solutions"]]
            rows.append({"question_id": row["question_id"], "trace": texts[0] if texts else None})
        yield pa.Table.from_pylist(rows, schema=TRACES)


if __name__ == "__main__":
    sys.exit(main("embed"))
