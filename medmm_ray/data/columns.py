"""Column maps: which columns of a table hold what, said in a recipe or in the declaration of a data set.

Enters: a row as `medmm_ray.data.rows` reads it. Leaves: a question, an image or a document of a source. A name with
dots reaches into objects and lists (``eval.answer``, ``conversations.0.value``).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config
from medmm_ray.data.rows import Embedded
from medmm_ray.data.tables import RowError, TableError
from medmm_ray.text import LETTERS, lettered_options

FIELDS = ("id", "question", "answer", "options", "images", "modality", "difficulty", "topic", "published_type",
          "group", "dataset", "split", "diagnosis")  # fmt: skip
"""What a column may hold."""


class StepColumns(Config):
    """The columns of a solution, its steps and their labels; of several rows of one question each is a solution."""

    column: str
    """The steps: a list of texts, or of objects. Required."""
    text: str = ""
    """Steps are objects: where the text of one is."""
    label: str = ""
    """Steps are objects: where the label of one is: 1 right, 0 neutral, -1 wrong."""
    value: str = ""
    """Steps are objects: where the share of right continuations of one is."""
    labels: str = ""
    """Column of a list of labels, one a step: 1 right, 0 neutral, -1 wrong."""
    first_error: str = ""
    """Column of the place of the first wrong step from 0, -1 where none is wrong; steps behind it have no label."""
    wrong_steps: str = ""
    """Column of the list of the wrong steps' places; all others are right."""
    first_number: int = 0
    """The place of the first step in `wrong_steps`: 0 or 1."""
    right: str = ""
    """Column that says whether the solution's answer is right; empty: nobody says so."""
    source: Literal["expert", "judge", "monte_carlo"] = "expert"
    """Who labelled."""


class ColumnMap(Config):
    """The columns of a table of questions, or of pictures without questions."""

    id: str = ""
    """The table's own id of a row; empty: its place in the file."""
    question: tuple[str, ...] = ("question",)
    """The question; of several columns their texts below each other, empty ones left out. []: pictures alone."""
    answer: str = "answer"
    """The answer: a letter, the text of an option, yes or no, or free text."""
    first_number: int | None = None
    """Answers are numbers of options, the first of which is this one (0 or 1); null: they are letters or texts."""
    options: tuple[str, ...] = ()
    """A column for each option, or the one that holds them: a list, an object by letters, or lettered lines."""
    lettered: bool = False
    """Whether options stand at the end of the question, in lines that begin with A. B. C."""
    images: tuple[str, ...] = ()
    """Columns with pictures: a file's name, a list of names, or the picture itself (Parquet)."""
    image_folders: tuple[str, ...] = ("images", "")
    """Folders of the pictures' files, below the data set's."""
    image_ending: str = ""
    """What is put behind a picture's name to make it a file's, as .jpg."""
    modality: str = ""
    """Column of the modality (radiology, pathology, clinical)."""
    difficulty: str = ""
    """Column of the difficulty (easy, medium, hard)."""
    topic: str = ""
    """Column of what a question is about: an organ, a subject."""
    published_type: str = ""
    """Column of the data set's own kind of question (closed, open)."""
    group: str = ""
    """Column of the patient or study that questions share."""
    dataset: str = ""
    """Column of the name of the data set that a question comes from."""
    split: str = ""
    """Column of the split (train, validation, test); empty: by the file (`files`, or its name)."""
    diagnosis: str = ""
    """Column of what a picture shows, in words."""
    fixed_options: tuple[str, ...] = ()
    """Options that all questions have: [yes, no, maybe]."""
    steps: StepColumns | None = None
    """The columns of solutions with labelled steps; null: the table has none."""
    constants: dict[str, str] = Field(default_factory=dict)
    """What holds for all rows, by field: {modality: pathology}."""
    words: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Values in the table's words and in ours, by field: {split: {val: validation}}."""
    header: tuple[str, ...] = ()
    """Names of the columns of CSV files that have no row of them."""
    records: str = ""
    """Field that holds the list of rows, in JSON files with an object around it."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Rows that are taken: those whose column has one of these values, {q_lang: [en]}."""

    @model_validator(mode="after")
    def _known_fields(self) -> "ColumnMap":
        for name in (*self.constants, *self.words):
            if name not in FIELDS:
                raise ValueError(f"constants and words name fields of a question ({', '.join(FIELDS)}), not {name!r}")
        return self


class DocumentColumns(Config):
    """The columns of a table of documents."""

    text: tuple[str, ...] = ("text",)
    """The text; of several columns their texts below each other."""
    title: str = "title"
    """Column of the title; a table without it has none."""
    corpus: str = ""
    """Column of the corpus; empty: the corpus of its section."""
    date: str = ""
    """Column of the date of publication (2024, 2024-05 or 2024-05-31), for retrieve.published_until."""
    modality: str = ""
    """Column of the modality (radiology, pathology, clinical), for retrieve.same_modality."""


def value_at(
    row: Mapping[str, Any],
    name: str,
    where: str,
) -> Any:
    """The value of a column; a `TableError` names the columns that there are."""
    # A name may have dots of its own.
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise TableError(f"{where} has no column {name!r}; it has {', '.join(sorted(map(str, row)))}")
    return value


def text_at(
    row: Mapping[str, Any],
    name: str,
    where: str,
) -> str:
    """The value of a column as text: null is empty, numbers are written out."""
    value = value_at(row, name, where)
    if value is None:
        return ""
    # Before numbers: true is one.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes | Embedded):
        raise TableError(f"{where}: the column {name!r} holds a picture where text is expected")
    return _written_out(value)


def _written_out(value: Any) -> str:
    """A value as text: of an object a line for each field, of a list its entries behind each other."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        lines = []
        for key, entry in value.items():
            lines.append(f"{str(key).replace('_', ' ')}: {_written_out(entry)}")
        return "\n".join(lines)
    if isinstance(value, list | tuple):
        return ", ".join(map(_written_out, value))
    return str(value).strip()


def field_of(
    columns: ColumnMap,
    name: str,
    row: Mapping[str, Any],
    where: str,
) -> str:
    """A field of a question as text: from its column in our words, else the constant, else empty."""
    column = getattr(columns, name)
    if not column:
        return columns.constants.get(name, "")
    value = text_at(row, column, where)
    return columns.words.get(name, {}).get(value, value)


def question_text(
    columns: ColumnMap,
    row: Mapping[str, Any],
    where: str,
) -> str:
    """The texts of the question's columns below each other."""
    # Empty ones are parts that this question lacks.
    texts = [text_at(row, name, where) for name in columns.question]
    return "\n".join(filter(None, texts))


def options_of(
    columns: ColumnMap,
    row: Mapping[str, Any],
    where: str,
) -> list[str]:
    """The texts of the options, in the order of their letters; none for a question without."""
    if len(columns.options) > 1:
        texts = [text_at(row, name, where) for name in columns.options]
        # Sets with five columns have questions with four options.
        while texts and not texts[-1]:
            texts.pop()
        return _without_letters(texts)
    if not columns.options:
        return list(columns.fixed_options)
    return _options(value_at(row, columns.options[0], where), where)


def _options(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        question, options = lettered_options(value)
        if question or not options:
            raise TableError(f"{where}: options as one text are lines that begin with A. B. C.")
        return options
    if isinstance(value, Mapping):
        # As the datasets library writes a list of choices: {"label": [A, B], "text": [one, two]}.
        # ARC and those after it.
        if isinstance(value.get("text"), list):
            return list(map(str, value["text"]))
        if sorted(value) != list(LETTERS[: len(value)]):
            raise TableError(
                f"{where}: options must be a list, or texts by their letters from A on; not {sorted(value)}"
            )
        return [str(value[letter]) for letter in sorted(value)]
    if isinstance(value, Sequence):
        return _without_letters([_option_text(option) for option in value])
    raise TableError(f"{where}: options must be a list, not a {type(value).__name__}")


_LETTER = re.compile(r"^\s*\(?([A-Z])[.):]\s*")


def _option_text(option: Any) -> str:
    if isinstance(option, Mapping):
        option = option.get("content") or option.get("value") or option.get("text") or ""
    return str(option).strip()


def _without_letters(texts: list[str]) -> list[str]:
    """The options without the letters that some sets write before them: where each has its own ("E. coli" has none)."""
    marks = [_LETTER.match(text) for text in texts]
    letters = "".join(mark[1] for mark in marks if mark)
    if len(texts) < 2 or letters != LETTERS[: len(texts)]:
        return texts
    return [_LETTER.sub("", text).strip() for text in texts]


def answer_of(
    columns: ColumnMap,
    row: Mapping[str, Any],
    options: Sequence[str],
    where: str,
) -> str:
    """The answer as `Question.answer` may hold it; raises `RowError` for a number that is none of the options."""
    if not columns.answer:
        return columns.constants.get("answer", "")
    value = value_at(row, columns.answer, where)
    # Choices that say themselves whether they are right.
    if isinstance(value, list) and value and all(isinstance(choice, dict) and "correct" in choice for choice in value):
        places = [place for place, choice in enumerate(value) if choice["correct"]]
        return LETTERS[places[0]] if places else ""
    # Several accepted answers: the first is the one that the set prefers.
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else ""
    text = "" if value is None else str(value).strip()
    text = columns.words.get("answer", {}).get(text, text)
    # A number without options is an answer in words: a count.
    if columns.first_number is None or not options:
        return text
    try:
        place = int(text) - columns.first_number
    except ValueError:
        raise RowError("answer_not_in_options", f"{where}: the answer is no number of an option") from None
    if not 0 <= place < len(options):
        raise RowError("answer_not_in_options", f"{where}: the answer is number {text} of {len(options)} options")
    return LETTERS[place]


AnswerType = Literal["choice", "yes_no", "open"]


def answer_type_of(options: Sequence[str], answer: str) -> AnswerType:
    """Choice where there are options; else yes_no where the answer is one of these; else open."""
    if options:
        return "choice"
    return "yes_no" if answer.strip().lower() in ("yes", "no") else "open"


def pictures_of(
    columns: ColumnMap,
    row: Mapping[str, Any],
    where: str,
) -> list[str | Embedded]:
    """The pictures of a row: names of files, or places inside the table."""
    pictures: list[str | Embedded] = []
    for name in columns.images:
        value = value_at(row, name, where)
        values = value if isinstance(value, list | tuple) else [value]
        for picture in values:
            # What lies in the table has no file to be named.
            if isinstance(picture, Embedded):
                pictures.append(picture)
            elif picture:
                pictures.append(f"{picture}{columns.image_ending}")
    return pictures
