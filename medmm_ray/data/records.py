"""What a record is: one frozen dataclass a table; its Arrow schema is derived here, never typed twice.

Ids come from content (`config.digest`), so that a rerun names the same rows the same way. Every record has `error`:
None, or ``kind: what happened`` for a row that could not be made; the kinds are counted in the table's manifest.
"""

import dataclasses
import functools
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

# Vectors and scores are computed in 32 bits at most; 64 would double their tables.
Float32 = Annotated[float, "float32"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. `answer` is a letter (choice), ``yes``/``no`` (yes_no) or text (open).

    `source` names the reader, `dataset` the data set that the question comes from (medqa, pubmedqa, …): a reader may
    read several. `published_type` and `topic` are the data set's own words for the kind of question (closed, open) and
    for what it is about (an organ, a subject); empty where it has none. Questions of one `group` are not independent:
    they share a patient, a study or a picture.
    """

    key: ClassVar[tuple[str, ...]] = ("question_id",)
    question_id: str
    source: str
    split: str
    modality: str
    difficulty: str
    question: str
    options: list[str]
    answer: str
    answer_type: str
    image_ids: list[str]
    dataset: str = ""
    published_type: str = ""
    topic: str = ""
    group: str = ""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenQuestion:
    """A question that the model `author` wrote for an image; `num_solved` of `num_checks` answers agreed with `answer`.

    `num_solved_blind` counts the same without the image. `refused` says why a question is not good enough, as
    ``kind: reason``; `error` what went wrong. `cost` is in US dollars. `answered_by` as in `Labels`.
    """

    key: ClassVar[tuple[str, ...]] = ("written_id",)
    written_id: str
    image_id: str
    author: str
    split: str
    modality: str
    question: str = ""
    options: list[str] = field(default_factory=list)
    answer: str = ""
    difficulty: str = ""
    explanation: str = ""
    num_checks: int = 0
    num_solved: int = 0
    num_solved_blind: int = 0
    refused: str | None = None
    cost: float = 0.0
    answered_by: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image: where its bytes lie and what is known of it. `annotation` is JSON, the source's own."""

    key: ClassVar[tuple[str, ...]] = ("image_id",)
    image_id: str
    uri: str
    sha256: str
    perceptual_hash: str
    width: int
    height: int
    split: str
    modality: str
    diagnosis: str
    annotation: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus that may be retrieved, of any length.

    `date` is of its publication, as ``2024``, ``2024-05`` or ``2024-05-31``; `modality` as of a question; both are ""
    where they are not known.
    """

    key: ClassVar[tuple[str, ...]] = ("document_id",)
    document_id: str
    corpus: str
    title: str
    text: str
    date: str = ""
    modality: str = ""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document that its encoder reads whole, with its `vector`; what else it has is the document's.

    `encoder` is what made the vector, as JSON (`engines.encoder_identity`); None without a vector, and in rows of
    earlier versions.
    """

    key: ClassVar[tuple[str, ...]] = ("passage_id",)
    passage_id: str
    document_id: str
    corpus: str
    title: str
    text: str
    date: str
    modality: str
    vector: list[Float32]
    encoder: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked up for a question: a text, and its vector; `encoder` as in `Passage`."""

    key: ClassVar[tuple[str, ...]] = ("question_id",)
    question_id: str
    text: str
    vector: list[Float32]
    encoder: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One embedding of an image, of unit length; `item_id` is the image's id, `encoder` as in `Passage`."""

    key: ClassVar[tuple[str, ...]] = ("item_id",)
    item_id: str
    vector: list[Float32]
    encoder: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RetrievedDocument:
    """A passage of a question's evidence; a higher `score` is better, and comes from the last ranker that ordered it.

    `dense` (similarity of vectors), `lexical` (BM25) and `reranker` (the cross-encoder's log-odds) are what each ranker
    says; None where the passage was not among what the ranker gave.
    """

    document_id: str
    text: str
    score: float
    passage_id: str = ""
    corpus: str = ""
    title: str = ""
    dense: float | None = None
    lexical: float | None = None
    reranker: float | None = None


@dataclass(frozen=True, kw_only=True)
class RetrievedImage:
    """A reference image of a question's evidence, with its cosine `similarity`."""

    image_id: str
    uri: str
    diagnosis: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was retrieved for a question, best first."""

    key: ClassVar[tuple[str, ...]] = ("question_id",)
    question_id: str
    config_hash: str
    documents: list[RetrievedDocument]
    images: list[RetrievedImage]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One sampled chain of reasoning. `steps` are the texts without their ``Step i:`` marks, byte for byte what is
    scored; an imported solution whose marks do not count from 1, or that begins with other text, has them in its steps.

    `correct` compares `answer` with the question's; None where no answer was found, or it could not be graded.
    """

    solution_id: str
    index: int
    text: str
    steps: list[str]
    answer: str | None
    correct: bool | None
    finish_reason: str
    seed: int
    text_sha: str


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many there are of a kind."""

    kind: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Solutions:
    """All solutions of one question by one policy.

    Of `num_drawn` samples the quality filter refused some, counted in `rejected` by reason. A question that could not
    be filled lacks `num_missing` of the `num_requested` solutions. `cost` is in US dollars; `answered_by` as in
    `Labels`.
    """

    key: ClassVar[tuple[str, ...]] = ("question_id",)
    question_id: str
    policy: str
    config_hash: str
    num_requested: int
    num_missing: int = 0
    num_drawn: int = 0
    rejected: list[Count] = field(default_factory=list)
    cost: float = 0.0
    solutions: list[Solution]
    answered_by: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """One step in a search tree; its place in the list of nodes is its name, 0 the root (no step, `parent` -1).

    `action` says how it was drawn (reason, finish, reflect); `value` is what the search holds of it (None: neither it
    nor a node below it came to an answer that could be graded), `num_correct` of `num_rollouts` its own rollouts (None:
    not rolled out). `answer` is stated where a solution ends in it; a `closed` node is not searched any further.
    """

    parent: int
    step: str
    action: str
    value: float | None = 0.0
    visits: int = 0
    num_correct: int | None = None
    num_rollouts: int | None = None
    answer: str | None = None
    correct: bool | None = None
    closed: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The search tree of one question by one policy; `num_rejected` counts samples that could not become nodes."""

    key: ClassVar[tuple[str, ...]] = ("question_id",)
    question_id: str
    policy: str
    config_hash: str
    nodes: list[TreeNode]
    num_rejected: int
    num_tokens: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepLabel:
    """What one source says of one step. `label`: 1 right, 0 wrong, None not labelled or nothing checkable.

    `value` is a probability (Monte Carlo: num_correct / num_rollouts; tree search: what the tree holds of the prefix);
    `confidence` is high, medium or low. A judge's three tests: `logical` (it follows), `medical` (it agrees with what
    is known), `image_grounded` (with the image).
    `stopped_early`: Monte Carlo ended when the label was known, and num_correct / num_rollouts is too high.
    """

    label: int | None = None
    value: float | None = None
    confidence: str | None = None
    num_correct: int | None = None
    num_rollouts: int | None = None
    stopped_early: bool | None = None
    logical: bool | None = None
    medical: bool | None = None
    image_grounded: bool | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Labels:
    """One source's labels of one solution, one entry a step. `cost` is in US dollars.

    `saw_answer`: whoever labelled was shown the gold answer. `annotator` names who was asked, and how;
    `answered_by` the model that answered, as its API states it (several are joined by commas; None without an API).
    """

    key: ClassVar[tuple[str, ...]] = ("solution_id", "source", "annotator")
    question_id: str
    solution_id: str
    source: str
    annotator: str
    steps: list[StepLabel]
    cost: float
    saw_answer: bool = False
    answered_by: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReviewItem:
    """One step in the expert's queue. `inclusion_probability` weights it in figures about the whole."""

    key: ClassVar[tuple[str, ...]] = ("solution_id", "step_index")
    question_id: str
    solution_id: str
    step_index: int
    stratum: str
    inclusion_probability: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class QuestionReview:
    """What one reader says of a question itself. `keep` is None where the reader is not sure.

    `answer_right` and `difficulty` (easy, medium, hard) are None where nothing was said of them.
    """

    key: ClassVar[tuple[str, ...]] = ("question_id", "annotator")
    question_id: str
    annotator: str
    keep: bool | None
    answer_right: bool | None
    difficulty: str | None
    comment: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class States:
    """Text-tower states at the step tags of one solution, for training on a frozen tower.

    `states` and `summaries` hold [num_steps, hidden_size] little-endian values of `dtype` (bfloat16 as its raw uint16).
    """

    key: ClassVar[tuple[str, ...]] = ("solution_id",)
    question_id: str
    solution_id: str
    model: str
    evidence_hash: str
    num_steps: int
    hidden_size: int
    dtype: str
    states: bytes
    summaries: bytes
    text_log_odds: list[Float32]
    error: str | None = None


@dataclass(frozen=True)
class RowGroups:
    """How part files of large rows are cut, so that few of them can be read without the others: a row group has at most
    `num_rows` rows of one value of `column`. What is in `raw` is written as it is."""

    column: str
    num_rows: int
    raw: tuple[str, ...]


ROW_GROUPS: "dict[type, RowGroups]" = {
    # A training reads some solutions of a question at a time; of an 8B model eight of them have 1 MiB.
    States: RowGroups("question_id", 8, ("states", "summaries")),
}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A reward model's scores of one solution: log-odds of ``+`` a step = text part + image part (exactly)."""

    key: ClassVar[tuple[str, ...]] = ("solution_id", "arm")
    question_id: str
    solution_id: str
    model: str
    arm: str
    text_log_odds: list[Float32]
    image_log_odds: list[Float32]
    error: str | None = None


_ARROW = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.large_binary(),  # 64-bit offsets: the states of one file may be over 2 GiB
}


def _arrow_type(annotation: Any) -> pa.DataType:
    if get_origin(annotation) is Annotated:
        return pa.type_for_alias(get_args(annotation)[1])
    if get_origin(annotation) in (Union, types.UnionType):
        # `X | None` is X: that it may be null is said of the field, not of its type.
        members = [member for member in get_args(annotation) if member is not type(None)]
        assert len(members) == 1, f"a union of several types has no Arrow type: {annotation}"
        return _arrow_type(members[0])
    if get_origin(annotation) is list:
        return pa.list_(_arrow_type(get_args(annotation)[0]))
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(arrow_schema(annotation)))  # type: ignore[arg-type]
    return _ARROW[annotation]


def _nullable(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def arrow_schema(record: type) -> pa.Schema:
    """The Arrow schema of a record type: nested records are structs, lists are explicit."""
    hints = get_type_hints(record, include_extras=True)  # with `Float32`'s annotation
    columns = []
    for record_field in dataclasses.fields(record):
        annotation = hints[record_field.name]
        columns.append(
            pa.field(
                record_field.name,
                _arrow_type(annotation),
                nullable=_nullable(annotation),
            )
        )
    return pa.schema(columns)


def to_arrow(record: type, rows: list[Any]) -> pa.Table:
    """Rows (records of one type, or dicts of their fields) as an Arrow table of the record's schema."""
    return pa.Table.from_pylist(
        _plain(rows),
        schema=arrow_schema(record),
    )


def to_arrow_lists(record: type, lists: Iterable[Sequence[Any]]) -> pa.Array:
    """Lists of rows (as in `to_arrow`) as a column of lists: what a step gives that makes several rows for one."""
    list_type = pa.list_(pa.struct(list(arrow_schema(record))))
    return pa.array([_plain(rows) for rows in lists], list_type)


def _plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]


def from_dict(record: type, row: dict[str, Any]) -> Any:
    """A plain row back as a record, nested records included; fields without a column have their default, or None."""
    hints = _hints(record)
    defaults = _default_names(record)
    values = {}
    for name, annotation in hints.items():
        # A table of an earlier version lacks columns.
        if name in row or name not in defaults:
            values[name] = _revive(annotation, row.get(name))
    return record(**values)


# Cached: annotations are text that is evaluated, too slow to do once a row.
@functools.cache
def _hints(record: type) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {record_field.name: hints[record_field.name] for record_field in dataclasses.fields(record)}


@functools.cache
def _default_names(record: type) -> set[str]:
    names = set()
    for record_field in dataclasses.fields(record):
        if record_field.default is not MISSING or record_field.default_factory is not MISSING:
            names.add(record_field.name)
    return names


def _revive(annotation: Any, value: Any) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(annotation):
        return from_dict(annotation, value)  # type: ignore[arg-type]
    if get_origin(annotation) is list:
        return [_revive(get_args(annotation)[0], item) for item in value]
    return value
