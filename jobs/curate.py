"""raw_questions, raw_images -> questions, images: each once, with splits that share no picture.

A report of what left and why (``curation_report.html`` and ``.json``) lies at the top of the run's folder too.
"""

import sys
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job, Run
from medmm_ray.data.json_documents import to_json
from medmm_ray.data.records import QuestionReview
from medmm_ray.data.tables import Table, filesystem, write_file
from medmm_ray.engines.images import open_image
from medmm_ray.pages.curation_page import render
from medmm_ray.steps.curate import confirm, curate, propose, reviewed, thumbnails
from medmm_ray.steps.curate.altered import compare, confirmed, describe, propose_altered, to_describe
from medmm_ray.steps.curate.phi import kinds_of, scan
from medmm_ray.steps.curate.report import CurationReport

if TYPE_CHECKING:
    from ray.data import Dataset


def run(job: Job) -> None:
    """Take written questions in, find near duplicates, and write what stays."""
    import ray

    images = job.read("raw_images")
    reviews = review_table(job.run, job.config.reviews).to_arrow() if job.config.reviews else None
    questions = reviewed(job.read("raw_questions"), job.read("new_questions"), reviews, job.config)
    proposed, pairs = propose(images, job.config)
    job.waiting = f"pixels of {proposed.num_rows:,} images that may be duplicates"
    duplicates: dict[str, list[tuple[str, str]]] = {"near_duplicate": []}
    if proposed.num_rows:
        details = _collected(thumbnails(ray.data.from_arrow(proposed), job.config))
        duplicates["near_duplicate"] = confirm(proposed, pairs, details, job.config)
    if job.config.altered_pictures:
        duplicates["altered"] = altered_pairs(job, images)
    final = curate(questions, images, duplicates, job.config, phi_kinds(job, questions))
    for note in final.notes:
        job.note(note)
    job.make_rows("images", final.images, "image_id")
    job.make_rows("questions", final.questions, "question_id", final.figures)
    job.make_artifact("curation_report", lambda uri: write_report(final.report, uri, job.run.root))


def phi_kinds(job: Job, questions: pa.Table) -> dict[str, list[str]]:
    """The kinds of identifiers in each question that has some."""
    from ray.data import from_arrow

    if job.config.phi == "off" or not questions.num_rows:
        return {}
    job.waiting = f"identifiers of persons in {questions.num_rows:,} questions"
    columns = questions.select(["question_id", "question", "options", "answer"])
    return kinds_of(_collected(scan(from_arrow(columns), job.config)))


def write_report(report: CurationReport, *folders: str) -> dict[str, float]:
    """The report as JSON and as a page, in each of the folders; figures for its manifest."""
    files = {
        "curation_report.json": to_json(report),
        "curation_report.html": render(report, open_image).encode(),
    }
    for name, content in files.items():
        for folder in folders:
            fs, path = filesystem(f"{folder}/{name}")
            write_file(fs, path, content)
    return {"questions": float(report.gates[-1].after), "flagged": float(len(report.phi))}


def altered_pairs(job: Job, images: pa.Table) -> list[tuple[str, str]]:
    """Pairs of images that are one picture, cropped, turned, inverted or with a border."""
    from ray.data import from_arrow

    described = to_describe(images)
    if described.num_rows < 2:
        return []
    job.waiting = f"descriptors of {described.num_rows:,} images"
    descriptors = _collected(describe(from_arrow(described), job.config))
    pairs = propose_altered(described, descriptors)
    if not pairs.num_rows:
        return []
    job.waiting = f"alignment of {pairs.num_rows:,} pairs of images that may be one picture, altered"
    # Small blocks: a pair takes some hundredths of a second.
    rows = from_arrow(pairs).repartition(target_num_rows_per_block=256)
    return confirmed(_collected(compare(rows, job.config)), job.config)


def _collected(ds: "Dataset") -> pa.Table:
    """All rows of a data set; an empty block has no columns, and would not fit the others."""
    import ray

    blocks = ray.get(ds.to_arrow_refs())
    return pa.concat_tables(block for block in blocks if block.num_rows)


def review_table(run: Run, name: str) -> Table:
    """What readers said of questions, by the name of its export."""
    return Table(f"{run.root}/question_reviews/{name}", QuestionReview)


if __name__ == "__main__":
    sys.exit(main("curate"))
