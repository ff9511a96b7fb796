"""What a run would read, at the first rows of each source: for people who try their own data.

Enters: the section ``ingest``. Leaves: lines for the screen, in seconds and without Ray, without text of a question.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from medmm_ray.data.documents import read_corpora
from medmm_ray.data.records import Image, Question, to_arrow
from medmm_ray.data.tables import error_kind
from medmm_ray.steps.ingest.images import drawings_of, image_table, inspect_image
from medmm_ray.steps.ingest.reading import IngestConfig, ReadSource, SourceConfig, read_source
from medmm_ray.steps.ingest.rows import question_rows

ROWS = 100


def check(
    config: IngestConfig,
    folder: str,
    num_rows: int = ROWS,
) -> Iterator[str]:
    """Lines on each source and corpus: what its first rows are, and which of them fail why.

    Pictures that a source makes are written below `folder`. A fault that would end the run is raised.
    """
    for source in config.sources:
        yield from _of_source(
            _fewer(source, num_rows),
            config.seed,
            folder,
            num_rows,
        )
    for corpus in config.documents:
        documents = read_corpora([corpus.model_copy(update={"max_documents": num_rows})])
        lengths = [len(document.text.split()) for document in documents]
        titled = sum(bool(document.title) for document in documents)
        corpora = ", ".join(sorted({document.corpus for document in documents}))
        mean = sum(lengths) // len(lengths)
        yield f"{corpus.path}: {len(documents)} documents of {corpora}; {titled} titles, {mean} words each"


def _fewer(source: SourceConfig, num_rows: int) -> SourceConfig:
    # Fewer than a recipe asks for, never more.
    limits = {}
    for name in ("num_train", "num_test"):
        limit = getattr(source, name)
        limits[name] = num_rows if limit is None else min(limit, num_rows)
    return source.model_copy(update={**limits, "num_extra_images": min(source.num_extra_images, num_rows)})


def _of_source(
    config: SourceConfig,
    seed: int,
    folder: str,
    num_rows: int,
) -> Iterator[str]:
    data = read_source(config, seed)
    # Of pictures without questions there may be millions.
    if not data.questions:
        data = replace(data, images=data.images[:num_rows])
    source = ReadSource(config, data)
    images = _inspected(source, folder)
    questions = question_rows([source], images_table(images), folder)
    numbers = f"{len(questions)} questions, {len(images)} images, {len(data.documents)} documents"
    yield f"{config.name}: {numbers} at a first look"
    if questions:
        yield from _counts(questions)
        yield from _errors("questions", [question.error for question in questions])
    if images:
        sizes = [f"{image.width} x {image.height}" for image in images if not image.error]
        common = ", ".join(f"{size} ({count})" for size, count in Counter(sizes).most_common(3))
        yield f"  images: {common or 'none can be opened'}"
        yield from _errors("images", [image.error for image in images])
        burnt_in = sum(map(_may_have_text, images))
        if burnt_in:
            yield f"  images: {burnt_in} may have text burnt into their pixels; look at them before they are shared"


def images_table(images: Sequence[Image]) -> pa.Table:
    """Inspected images as a table, as a finished raw_images would be."""
    return to_arrow(Image, list(images))


def _may_have_text(image: Image) -> bool:
    return '"burnt_in": "yes"' in image.annotation or '"burnt_in": "maybe"' in image.annotation


def _inspected(source: ReadSource, folder: str) -> list[Image]:
    # In this process: a hundred pictures take a second.
    (drawing,) = drawings_of([source])
    images = []
    for row in image_table([source], folder).to_pylist():
        images.append(inspect_image(row, drawing if row["drawn_by"] is not None else None))
    return images


def _counts(questions: Sequence[Question]) -> Iterator[str]:
    for name in ("split", "answer_type", "modality", "difficulty", "dataset"):
        counts = Counter(getattr(question, name) or "(none)" for question in questions)
        words = ", ".join(f"{value} {count}" for value, count in sorted(counts.items()))
        yield f"  {name}: {words}"
    options = Counter(len(question.options) for question in questions if question.options)
    if options:
        yield "  options: " + ", ".join(f"{number} ({count})" for number, count in sorted(options.items()))
    groups = len({question.group for question in questions})
    yield f"  groups (patients, studies, pictures): {groups}"


def _errors(what: str, errors: Sequence[str | None]) -> Iterator[str]:
    """The errors by kind, each with its first example."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for error in errors:
        if error:
            counts[error_kind(error)] += 1
            examples.setdefault(error_kind(error), error)
    for kind, count in counts.most_common():
        yield f"  {what} with an error: {count} of {len(errors)} {examples[kind]}"
