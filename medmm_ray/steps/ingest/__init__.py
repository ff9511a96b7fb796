"""Ingest: what sources yield, as the tables raw_questions, raw_images, documents and demonstrations.

Images are drawn (where the source has no files), opened, hashed and measured in Ray workers; a question's id contains
the hashes of its images, so questions are made after them. A row that is not usable keeps its place, with an `error`:

- image_missing, image_empty, image_format, image_corrupt, image_too_large: the file cannot become a picture;
- answer_not_in_options, answer_not_yes_no, answer_empty, question_empty, options_missing, options_repeated,
  duplicate_id, image_unknown: the question cannot be used; ``upstream: …`` repeats the fault of its image.
"""

from medmm_ray.steps.ingest.images import drawings_of, image_table, inspect_batch, inspect_image, inspect_images
from medmm_ray.steps.ingest.reading import (
    IngestConfig,
    ReadSource,
    SourceConfig,
    read_source,
    read_sources,
    reader_of,
    request_of,
)
from medmm_ray.steps.ingest.rows import WORKED, checked_answer, demonstration_rows, document_rows, question_rows

VERSION = 6  # of what a step makes: raise it when the same config makes something else
__all__ = [
    "WORKED",
    "IngestConfig",
    "ReadSource",
    "SourceConfig",
    "checked_answer",
    "demonstration_rows",
    "document_rows",
    "drawings_of",
    "image_table",
    "inspect_batch",
    "inspect_image",
    "inspect_images",
    "question_rows",
    "read_source",
    "read_sources",
    "reader_of",
    "request_of",
]
