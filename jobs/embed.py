"""images, documents, questions -> image_vectors, document_vectors, query_vectors."""

import sys
from functools import partial

from jobs.entry import main
from jobs.step import Job
from medmm_ray.steps.embed import embed_documents, embed_images, embed_questions


def run(job: Job) -> None:
    """Make the vectors of images, documents and questions."""
    tower = job.run.model("image_tower")
    # Blocks of a few batches, so that a lost actor costs little; of images they hold whole pictures on the way.
    image_rows = 2 * job.config.image_batch_size
    for output, source_table, key, embed, rows in (
        ("image_vectors", "images", "image_id", embed_images, image_rows),
        ("document_vectors", "documents", "document_id", embed_documents, 256),
        ("query_vectors", "questions", "question_id", embed_questions, 256),
    ):
        source = job.table(source_table).dataset(rows_per_block=rows)
        ids = job.read(source_table, [key])[key].to_pylist()
        job.make(output, source, ids, partial(embed, config=job.config, image_tower=tower), key, output_key="item_id")


if __name__ == "__main__":
    sys.exit(main("embed"))
