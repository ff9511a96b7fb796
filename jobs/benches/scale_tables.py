"""Tables of a run with the ids of many questions, few solutions each and hardly any text, for `jobs.bench scale`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.graph import MAKER
from jobs.step import Run, load_recipe
from medmm_ray.config import Config
from medmm_ray.data.records import States
from medmm_ray.data.tables import Provenance, Table

ROW_GROUP = 10_000
"""Questions of a row group."""
STATES_ROW_GROUP = 1_000
"""Solutions of a row group of states, of which a file has `ROW_GROUP` questions: an 8B model's have 1 GB."""
DIFFICULTIES = ("easy", "medium", "hard")


class TableShape(Config):
    """What a question has."""

    solutions: int = 4
    """Solutions of a question."""
    steps: int = 4
    """Steps of a solution."""


def make_tables(
    shape: TableShape,
    number: int,
    words: Sequence[str],
) -> None:
    """Write the tables of a recipe's run, complete, with so many questions each."""
    run = Run(load_recipe(words))
    tables = {
        "questions": _questions,
        "images": _images,
        "evidence": _evidence,
        "solutions": _solutions,
        "judge_labels": _judge_labels,
        "monte_carlo_labels": _monte_carlo_labels,
        "states": _states,
    }
    for name, make in tables.items():
        table = run.table(name)
        table.prepare()
        files, num_rows = _written(table, make, shape, number)
        origin = Provenance(name=name, fingerprint=run.fingerprint(MAKER[name]), config={}, upstream={})
        table.clear()
        table.commit(
            origin,
            0.0,
            rows=num_rows,
            files=files,
            schema_hash="",
            content_hash="",
            errors={},
            cost=0.0,
        )


Columns = Mapping[str, Any]


def _written(
    table: Table,
    make: Callable[[TableShape, Any], Columns],
    shape: TableShape,
    number: int,
) -> tuple[list[str], int]:
    """The files of a table, one but of states, and its rows."""
    is_states = table.record is States
    questions_per_file, row_group = (ROW_GROUP, STATES_ROW_GROUP) if is_states else (number, ROW_GROUP)
    names: list[str] = []
    num_rows = 0
    for first in range(0, number, questions_per_file):
        names.append(f"part-{len(names)}.parquet")
        with pq.ParquetWriter(f"{table.path}/{names[-1]}", table.schema) as file:
            for start in range(first, min(first + questions_per_file, number), ROW_GROUP):
                numbers = np.arange(start, min(start + ROW_GROUP, number))
                rows = _filled(table.schema, make(shape, numbers))
                num_rows += rows.num_rows
                file.write_table(rows, row_group_size=row_group)
    return names, num_rows


def _filled(schema: pa.Schema, columns: Columns) -> pa.Table:
    """A table of the schema: these columns, and of the others whatever is empty."""
    num_rows = len(next(iter(columns.values())))
    arrays = []
    for field in schema:
        array = columns.get(field.name)
        arrays.append(_empty(field, num_rows) if array is None else _cast(array, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _cast(array: Any, to: pa.DataType) -> pa.Array:
    if isinstance(array, dict):  # the fields of a struct
        num_rows = len(next(iter(array.values())))
        fields = []
        for field in to:
            values = array.get(field.name)
            fields.append(_empty(field, num_rows) if values is None else _cast(values, field.type))
        return pa.StructArray.from_arrays(fields, fields=list(to))
    if isinstance(array, tuple):  # lists of so many entries
        length, entries = array
        values = _cast(entries, to.value_type)
        offsets = pa.array(np.arange(0, len(values) + 1, length), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, type=to)
    return pa.array(array, to) if isinstance(array, np.ndarray) else array.cast(to)


def _empty(field: pa.Field, num_rows: int) -> pa.Array:
    if field.nullable:
        return pa.nulls(num_rows, field.type)
    if pa.types.is_list(field.type):
        offsets = pa.array(np.zeros(num_rows + 1), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array([], field.type.value_type), type=field.type)
    value: object = 0
    if pa.types.is_string(field.type):
        value = ""
    elif pa.types.is_large_binary(field.type):
        value = b""
    return pa.repeat(pa.scalar(value).cast(field.type), num_rows)


def question_ids(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Array:
    """Ids as content gives them: in no order, all of a length."""
    return _scattered(numbers, 0x9E3779B97F4A7C15)


def image_ids(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Array:
    """The same of images, in another order: the images of neighbouring questions are no neighbours."""
    return _joined("i", _scattered(numbers, 0xC2B2AE3D27D4EB4F))


def _scattered(numbers: np.ndarray[Any, np.dtype[np.int64]], factor: int) -> pa.Array:
    scattered = numbers.astype(np.uint64) * np.uint64(factor)
    return pa.array([f"{value:016x}" for value in scattered.tolist()], pa.string())


def _choices(numbers: Any, values: Sequence[str]) -> pa.Array:
    return pa.array(values, pa.string()).take(pa.array(numbers % len(values)))


def _joined(ids: pa.Array, suffix: Any) -> pa.Array:
    return pc.binary_join_element_wise(ids, suffix, "-")


def _questions(_: TableShape, numbers: Any) -> Columns:
    ids = question_ids(numbers)
    return {
        "question_id": ids,
        "split": _choices(numbers, ("train", "train", "train", "test")),
        "modality": _choices(numbers, ("radiology", "pathology")),
        "difficulty": _choices(numbers, DIFFICULTIES),
        "question": _joined("What of", ids),
        "answer": _choices(numbers, ("A", "B")),
        "image_ids": (1, image_ids(numbers)),
    }


def _images(_: TableShape, numbers: Any) -> Columns:
    ids = image_ids(numbers)
    return {
        "image_id": ids,
        "sha256": ids,
        "split": _choices(numbers, ("train", "train", "train", "test")),
        "modality": _choices(numbers, ("radiology", "pathology")),
    }


def _evidence(_: TableShape, numbers: Any) -> Columns:
    # The picture of another question, which is one of training.
    of_training = (numbers // 4 * 4 + 1 - numbers % 4 % 2).astype(np.int64)
    images = {"image_id": image_ids(of_training)}
    return {"question_id": question_ids(numbers), "images": (1, images)}


def _solution_ids(shape: TableShape, numbers: Any) -> pa.Array:
    repeated = question_ids(numbers).take(pa.array(np.repeat(np.arange(len(numbers)), shape.solutions)))
    suffix = [str(place) for place in range(shape.solutions)] * len(numbers)
    return _joined(repeated, pa.array(suffix, pa.string()))


def _solutions(shape: TableShape, numbers: Any) -> Columns:
    ids = _solution_ids(shape, numbers)
    places = np.arange(len(ids))
    solution = {
        "solution_id": ids,
        "steps": (shape.steps, pa.repeat("x", shape.steps * len(ids))),
        "answer": _choices(places, ("A", "B", "B")),
        "correct": pa.array(places % 3 == 0),
        "finish_reason": pa.repeat("stop", len(ids)),
    }
    requested = np.full(len(numbers), shape.solutions)
    return {"question_id": question_ids(numbers), "num_requested": requested, "solutions": (shape.solutions, solution)}


def _states(shape: TableShape, numbers: Any) -> Columns:
    """Of each solution its steps, and no states: drivers do not read those."""
    ids = _solution_ids(shape, numbers)
    rows = pa.array(np.repeat(np.arange(len(numbers)), shape.solutions))
    return {
        "question_id": question_ids(numbers).take(rows),
        "solution_id": ids,
        "num_steps": np.full(len(ids), shape.steps),
        "dtype": pa.repeat("bfloat16", len(ids)),
    }


def _judge_labels(shape: TableShape, numbers: Any) -> Columns:
    return _labels(shape, numbers, "judge", 5)


def _monte_carlo_labels(shape: TableShape, numbers: Any) -> Columns:
    return _labels(shape, numbers, "monte_carlo", 4)


def _labels(
    shape: TableShape,
    numbers: Any,
    source: str,
    wrong_every: int,
) -> Columns:
    ids = _solution_ids(shape, numbers)
    place = np.arange(shape.steps * len(ids)) + int(numbers[0])
    label = {"label": (place % wrong_every > 0).astype(np.int64), "confidence": pa.repeat("high", len(place))}
    rows = pa.array(np.repeat(np.arange(len(numbers)), shape.solutions))
    return {
        "question_id": question_ids(numbers).take(rows),
        "solution_id": ids,
        "source": pa.repeat(source, len(ids)),
        "annotator": pa.repeat(source, len(ids)),
        "steps": (shape.steps, label),
    }
