"""images, documents, questions -> image_vectors, document_vectors, query_vectors."""

import sys
from functools import partial

from jobs.step import Job, main
from medmm_ray.steps.embed import embed_documents, embed_images, embed_questions


def run(job: Job) -> None:
    tower = job.run.model("image_tower")
    for made, read, key, embed in (
        ("image_vectors", "images", "image_id", embed_images),
        ("document_vectors", "documents", "document_id", embed_documents),
        ("query_vectors", "questions", "question_id", embed_questions),
    ):
        source = job.table(read).dataset(rows_per_block=256)
        ids = job.read(read, [key])[key].to_pylist()
        job.make(made, source, ids, partial(embed, config=job.config, image_tower=tower), key, made_key="item_id")


if __name__ == "__main__":
    sys.exit(main("embed"))
