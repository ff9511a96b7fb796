"""raw_images without a question -> written_questions: by a model that sees them, checked; new_questions to review."""

import sys

from jobs.step import Job, main
from medmm_ray.write_questions import usable, without_question, write_questions


def run(job: Job) -> None:
    import ray

    images = without_question(job.read("raw_images"), job.read("raw_questions"), job.config)
    if images.num_rows:
        source = ray.data.from_arrow(images).repartition(target_num_rows_per_block=job.config.batch_size)
        ids = images["image_id"].to_pylist()
        folder = f"{job.run.root}/api"
        job.make(
            "written_questions", source, ids, lambda ds: write_questions(ds, job.config, folder=folder), "image_id",
            "questions",
        )  # fmt: skip
    else:
        job.make_rows("written_questions", [], "written_id")
    job.make_rows("new_questions", usable(job.read("written_questions"), images), "question_id")


if __name__ == "__main__":
    sys.exit(main("write_questions"))
