"""What a question is scored with: its text, documents, images, and the images of another question.

Enters: the tables questions, images and evidence, in parts. Leaves: one row a question in a file, which solutions are
joined with for `score` and `states`. The control arm ``shuffled_image`` swaps whole questions' images, which separates
the effect of the right image from that of any image. Nothing is held whole: tables are sorted into files and read some
questions at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.data.records import Evidence, Image, Question, arrow_schema
from medmm_ray.data.sorted_rows import (
    SortedRows,
    listed_rows,
    rows_among,
    sort_rows,
    sort_tables,
    windows,
    write_sorted,
)
from medmm_ray.data.tables import attach
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from ray.data import Dataset

INPUT_SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "question_error": pa.string(),
        "image_uris": pa.list_(pa.string()),
        "reference_uris": pa.list_(pa.string()),
        "image_error": pa.string(),
        "shuffled_image_uris": pa.list_(pa.string()),
        "shuffled_reference_uris": pa.list_(pa.string()),
        "shuffled_image_error": pa.string(),
    }
)
QUESTION_COLUMNS = ["question_id", "split", "question", "options", "image_ids", "error"]
IMAGE_COLUMNS = ["image_id", "uri", "error"]
EVIDENCE_COLUMNS = ["question_id", "documents", "images", "error"]
"""What is needed of the tables."""
GROUPS_BYTES = 1 << 20
"""Members whose groups are numbered at a time: names become Python strings, three of each group."""

SHUFFLED = INPUT_SCHEMA.names[-3:]
_OWN = pa.schema(
    # `pictures` are the question's images as one word; null: it has none.
    [*list(INPUT_SCHEMA)[:-3], pa.field("split", pa.string()), pa.field("pictures", pa.string())]
)
_BREAK = "\n"  # between a split, whose name has none, and another word


class InputFiles(NamedTuple):
    """What solutions are joined with: a row a question, of `INPUT_SCHEMA`, and its documents."""

    cases: SortedRows
    documents: SortedRows


def inputs(solutions: "Dataset", files: InputFiles) -> "Dataset":
    """`Solutions` rows with all that scoring needs of their question; `score` and `states` take such rows."""
    ds = attach(solutions, files.cases, "question_id", INPUT_SCHEMA.names[1:])
    return attach(ds, files.documents, "question_id", ["documents", "evidence_error"])


def input_files(
    questions: Iterable[pa.Table],
    images: Iterable[pa.Table],
    evidence: Iterable[pa.Table],
    folder: str,
    seed: int = 0,
) -> InputFiles:
    """The tables, each in parts with the columns named above, as files in `folder`; `seed` is `ScoreConfig.seed`.

    A row has a question's text with options, its images and references, and another question's. That one is of the same
    split and has other images; its references come along, or they would give the first question's diagnosis away.
    """
    image_rows = sort_rows(
        images,
        "image_id",
        _columns(Image, IMAGE_COLUMNS),
        f"{folder}/images",
    )
    tables = sort_tables(
        {
            "questions": (questions, _columns(Question, QUESTION_COLUMNS)),
            "evidence": (evidence, _columns(Evidence, EVIDENCE_COLUMNS)),
        },
        "question_id",
        folder,
    )
    tables["images"] = listed_rows(
        tables["questions"],
        "image_ids",
        image_rows,
        f"{folder}/question_images",
    )
    own_rows = write_sorted(
        _own_rows(tables),
        "question_id",
        _OWN,
        f"{folder}/own",
    )
    swapped_rows = _others_rows(own_rows, folder, seed)
    cases = write_sorted(
        _cases(own_rows, swapped_rows),
        "question_id",
        INPUT_SCHEMA,
        f"{folder}/cases",
    )
    # Under a name of its own: the solutions have a column `error` too.
    names = {"question_id": "question_id", "documents": "documents", "error": "evidence_error"}
    documents = (rows.select(list(names)).rename_columns(names) for rows in tables["evidence"].batches())
    fields = [tables["evidence"].schema.field(name).with_name(new_name) for name, new_name in names.items()]
    return InputFiles(
        cases,
        write_sorted(documents, "question_id", pa.schema(fields), f"{folder}/documents"),
    )


def _columns(record: type, names: Sequence[str]) -> pa.Schema:
    schema = arrow_schema(record)
    return pa.schema([schema.field(name) for name in names])


# A question's own images


class _ImageFiles(NamedTuple):
    """The images of one question, and its references, as files; or why there are none."""

    uris: list[str]
    references: list[str]
    error: str | None


def _own_rows(tables: Mapping[str, SortedRows]) -> Iterator[pa.Table]:
    """Rows of `_OWN`, some questions at a time."""
    for window in windows(tables):
        questions = window["questions"].to_pylist()
        files = {row["image_id"]: row for row in window["images"].to_pylist()}
        references: dict[str, list[str]] = {}
        for row in window["evidence"].to_pylist():
            references[row["question_id"]] = [image["uri"] for image in row["images"] or ()]
        rows = [_own_row(row, files, references.get(row["question_id"], [])) for row in questions]
        yield pa.Table.from_pylist(rows, schema=_OWN)


def _own_row(
    question: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    references: list[str],
) -> dict[str, Any]:
    images = _image_files(question["image_ids"], files, references)
    return {
        "question_id": question["question_id"],
        "question": question_with_options(question["question"], question["options"]),
        "question_error": question["error"],
        "image_uris": images.uris,
        "reference_uris": images.references,
        "image_error": images.error,
        "split": question["split"],
        # The same images in another order are the same images.
        "pictures": digest(*sorted(question["image_ids"])) if question["image_ids"] else None,
    }


def _image_files(
    image_ids: Sequence[str], files: Mapping[str, Mapping[str, Any]], references: list[str]
) -> _ImageFiles:
    # All or none: a question read with some of its images would get another score than it is meant to.
    uris: list[str] = []
    for image_id in image_ids:
        if image_id not in files:
            return _ImageFiles([], [], f"image_missing: {image_id} is not in the table images")
        file = files[image_id]
        if file["error"]:
            return _ImageFiles([], [], f"upstream: {file['error']}")
        uris.append(file["uri"])
    return _ImageFiles(uris, references, None)


# Another question's


def _others_rows(own_rows: SortedRows, folder: str, seed: int) -> SortedRows:
    """For each question with images those of another one of its split, where there is one.

    Questions about the same images, a group, move together, so that none gets its own again: each group gets the images
    of the one behind it, in an order drawn from the seed, and the last those of the first.
    """
    members = sort_rows(
        map(_members, own_rows.batches()),
        "group",
        _MEMBERS,
        f"{folder}/members",
    )
    groups = (_groups(window["members"], seed) for window in windows({"members": members}, GROUPS_BYTES))
    ordered = sort_rows(
        groups,
        "place",
        _GROUPS,
        f"{folder}/groups",
    )
    donors = sort_rows(
        _donors(ordered),
        "group",
        _DONORS,
        f"{folder}/donors",
    )
    pairs = (_pairs(window) for window in windows({"members": members, "donors": donors}))
    by_donor = sort_rows(
        pairs,
        "donor",
        _PAIRS,
        f"{folder}/pairs",
    )
    swapped_rows = (_swapped(window) for window in windows({"pairs": by_donor, "own": own_rows}))
    return sort_rows(
        swapped_rows,
        "question_id",
        _OTHERS,
        f"{folder}/others",
    )


def _schema(*names: str) -> pa.Schema:
    return pa.schema({name: pa.string() for name in names})


_MEMBERS = _schema("group", "question_id")
_GROUPS = _schema("place", "group", "first_id")
_DONORS = _schema("group", "donor")
_PAIRS = _schema("donor", "question_id")
_OTHERS = pa.schema([INPUT_SCHEMA.field("question_id"), *(INPUT_SCHEMA.field(name) for name in SHUFFLED)])


def _members(own_rows: pa.Table) -> pa.Table:
    """The questions with images, each with its split and images as one word."""
    own_rows = own_rows.filter(pc.is_valid(own_rows["pictures"]))
    group = pc.binary_join_element_wise(own_rows["split"], own_rows["pictures"], _BREAK)
    return pa.table({"group": group, "question_id": own_rows["question_id"]}, schema=_MEMBERS)


def _groups(members: pa.Table, seed: int) -> pa.Table:
    """Groups by their smallest id, the same whatever the order of the rows, each with its place in the drawn order."""
    # Its threads would each keep a table of hashes and what they allocated.
    counted = members.group_by("group", use_threads=False).aggregate([("question_id", "min")])
    groups, first_ids = counted["group"].to_pylist(), counted["question_id_min"].to_pylist()
    places: list[str] = []
    for group, first_id in zip(groups, first_ids, strict=True):
        places.append(group.partition(_BREAK)[0] + _BREAK + digest(seed, first_id))
    return pa.table({"place": places, "group": groups, "first_id": first_ids}, schema=_GROUPS)


def _donors(ordered: SortedRows) -> Iterator[pa.Table]:
    """For each group the question that its images come from; a lone group of a split has none."""
    first: dict[str, str] | None = None
    previous: dict[str, str] | None = None
    for batch in ordered.batches():
        pairs: list[tuple[str, str]] = []
        for group in batch.to_pylist():
            if previous is not None and _split_of(previous) == _split_of(group):
                pairs.append((previous["group"], group["first_id"]))
            else:
                pairs += _closing_pair(first, previous)
                first = group
            previous = group
        yield _donor_rows(pairs)
    yield _donor_rows(_closing_pair(first, previous))


def _split_of(group: Mapping[str, str]) -> str:
    return group["place"].partition(_BREAK)[0]


def _closing_pair(
    first: Mapping[str, str] | None,
    last: Mapping[str, str] | None,
) -> list[tuple[str, str]]:
    """The last group of a split with the first one's question; none where they are one."""
    if first is None or last is None or first is last:
        return []
    return [(last["group"], first["first_id"])]


def _donor_rows(pairs: Sequence[tuple[str, str]]) -> pa.Table:
    rows = [dict(zip(_DONORS.names, pair, strict=True)) for pair in pairs]
    return pa.Table.from_pylist(rows, schema=_DONORS)


def _pairs(window: Mapping[str, pa.Table]) -> pa.Table:
    """The questions of groups, each with the question that its images come from."""
    members, donors = window["members"], window["donors"]
    places = pc.index_in(members["group"], donors["group"].combine_chunks())
    pairs = pa.table({"donor": donors["donor"].take(places), "question_id": members["question_id"]}, schema=_PAIRS)
    return pairs.filter(pc.is_valid(pairs["donor"]))


def _swapped(window: Mapping[str, pa.Table]) -> pa.Table:
    """The questions of pairs with the files of the other question."""
    pairs, own_rows = window["pairs"], window["own"]
    files = own_rows.take(pc.index_in(pairs["donor"], own_rows["question_id"].combine_chunks()))
    columns = [files[name.removeprefix("shuffled_")] for name in SHUFFLED]
    return pa.Table.from_arrays([pairs["question_id"], *columns], schema=_OTHERS)


def _cases(own_rows: SortedRows, swapped_rows: SortedRows) -> Iterator[pa.Table]:
    """Rows of `INPUT_SCHEMA`, some questions at a time."""
    # A lone question keeps its place in the arm, with an error.
    nothing = _ImageFiles([], [], "no_other_image: no other question of this split has another image to swap in")
    for window in windows({"own": own_rows, "others": swapped_rows}):
        swapped = rows_among(window["others"], "question_id", window["others"]["question_id"].to_pylist())
        rows = window["own"].to_pylist()
        for row in rows:
            files = swapped.get(row["question_id"])
            if files is not None:
                row |= files
            elif row["pictures"] is None:  # a question without an image stays without
                row |= {name: row[name.removeprefix("shuffled_")] for name in SHUFFLED}
            else:
                row |= dict(zip(SHUFFLED, nothing, strict=True))
        yield pa.Table.from_pylist(rows, schema=INPUT_SCHEMA)
