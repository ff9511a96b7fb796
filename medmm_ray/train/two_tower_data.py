"""What a two-tower model is trained on: questions with their images and targets, and the states of their solutions.

Enters: tables. Leaves: one row a question (`SCHEMA`) that says where its solutions' states are, and, in the worker, a
`TwoTowerExample` of some of them, read when it is trained on.

Legend: T tags, D text width.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels
from medmm_ray.data.tables import Table
from medmm_ray.stats.targets import Target, targets
from medmm_ray.train.reading import Cache, RowGroupReader
from medmm_ray.train.schedule import Part, Units

if TYPE_CHECKING:
    import torch

SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "diagnosis": pa.string(),
        "image_uris": pa.list_(pa.string()),
        "reference_uris": pa.list_(pa.string()),
        "solution_ids": pa.list_(pa.string()),
        "correct": pa.list_(pa.bool_()),
        "targets": pa.list_(pa.list_(pa.float64())),
        # Of each solution's states the file (a row of `FILES`), the row group there, and the row in that.
        "places": pa.list_(pa.list_(pa.int32(), 3)),
    }
)
FILES = pa.schema({"table": pa.string(), "name": pa.string()})
LOCATED = pa.schema(
    {
        "question_id": pa.string(),
        "solution_id": pa.string(),
        "num_steps": pa.int64(),
        "dtype": pa.string(),
        "error": pa.string(),
        "place": pa.list_(pa.int32(), 3),
    }
)
_STATES_COLUMNS = ("solution_id", "num_steps", "hidden_size", "dtype", "states", "summaries", "text_log_odds")
_FOOTER_READERS = 8  # of so many files the ids are in memory at a time
MIN_SAMPLED = 64


# In the driver: tables -> rows


def states_files(tables: Sequence[Table]) -> pa.Table:
    """The part files of tables of states (`FILES`), in the tables' order."""
    rows: list[dict[str, str]] = []
    for table in tables:
        rows += [{"table": table.uri, "name": name} for name in table.manifest().files]
    return pa.Table.from_pylist(rows, schema=FILES)


def located_states(files: pa.Table) -> Iterator[pa.Table]:
    """A row for each row of states, without the states: its ids, steps, error, and its `place` (see `SCHEMA`).

    File by file. Raises ValueError for states of several dtypes.
    """
    names = [(row["table"], row["name"]) for row in files.to_pylist()]
    reader = RowGroupReader(names)
    dtypes: set[str] = set()
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        for start in range(0, len(names), _FOOTER_READERS):
            numbers = range(start, min(start + _FOOTER_READERS, len(names)))
            for rows in pool.map(partial(_located_file, reader), numbers):
                dtypes.update(pc.unique(rows.filter(pc.is_null(rows["error"]))["dtype"]).to_pylist())
                yield rows
    if len(dtypes) > 1:
        tables = sorted(set(files["table"].to_pylist()))
        raise ValueError(
            f"{', '.join(tables)}: states of the dtypes {sorted(dtypes)}; expected one text tower's, of one dtype"
        )


def _located_file(reader: RowGroupReader, number: int) -> pa.Table:
    rows, places = reader.read_all(number, LOCATED.names[:-1])
    return rows.append_column("place", places).cast(LOCATED)


def questions_with_images(
    states: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table,
    policy: str,
    after_first_error: str = "collapse",
    num_references: int = 0,
) -> pa.Table:
    """One row a training question that has an image, with the targets of its solutions (`SCHEMA`), in stored order.

    `states` are rows of `located_states`; `policy` and `after_first_error` make targets of labels; the nearest
    `num_references` reference images are taken. `correct` says of each solution whether its final answer is right: of
    one without an answer it is not. A question's rows in `solutions`, one a source, become one.
    """
    correct = _correct_by_solution(solutions)
    accuracy = _accuracy_by_solution(solutions)
    solutions_by_question = _targets_by_question(
        states,
        labels,
        correct,
        accuracy,
        policy,
        after_first_error,
    )
    reference_uris = _reference_uris(evidence, num_references)
    # An image that could not be read has a row with its error.
    images_by_id = {image["image_id"]: image for image in images.to_pylist() if image["error"] is None}
    rows: list[dict[str, Any]] = []
    for question in questions.to_pylist():
        question_id = question["question_id"]
        question_images = [images_by_id[i] for i in question["image_ids"] if i in images_by_id]
        is_usable = question["split"] == "train" and question["error"] is None
        if not is_usable or not question_images or question_id not in solutions_by_question:
            continue
        # Ray keeps no order of rows, a training needs one. Neighbours in a file are trained on together.
        located = sorted(solutions_by_question[question_id], key=lambda solution: solution.place)
        rows.append(
            {
                "question_id": question_id,
                "diagnosis": question_images[0]["diagnosis"],  # swapped images are of another one
                "image_uris": [image["uri"] for image in question_images],
                "reference_uris": reference_uris.get(question_id, []),
                "solution_ids": [solution.solution_id for solution in located],
                "correct": [bool(correct.get(solution.solution_id)) for solution in located],
                "targets": [solution.targets for solution in located],
                "places": [solution.place for solution in located],
            }
        )
    rows.sort(key=lambda row: str(row["question_id"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class _LocatedSolution(NamedTuple):
    """A solution's targets, and where its states are."""

    solution_id: str
    targets: list[Target]
    place: list[int]


def _reference_uris(evidence: pa.Table, num_references: int) -> dict[str, list[str]]:
    """The nearest reference images of each question."""
    uris_by_question: dict[str, list[str]] = {}
    for row in evidence.to_pylist():
        if row["error"] is None:
            references = row["images"][:num_references]
            uris_by_question[row["question_id"]] = [image["uri"] for image in references]
    return uris_by_question


def _targets_by_question(
    states: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    correct: Mapping[str, bool | None],
    accuracy: Mapping[str, float | None],
    policy: str,
    after_first_error: str,
) -> dict[str, list[_LocatedSolution]]:
    """The solutions that have states and a target, by question."""
    solutions_by_question: dict[str, list[_LocatedSolution]] = {}
    for row in states.to_pylist():
        if row["error"] is not None:
            continue
        solution_id = row["solution_id"]
        step_targets = targets(
            policy,
            labels.get(solution_id, []),
            row["num_steps"],
            after_first_error,
            correct.get(solution_id),
            accuracy.get(solution_id),
        )
        if any(target is not None for target in step_targets):
            located = _LocatedSolution(
                solution_id,
                step_targets,
                row["place"],
            )
            solutions_by_question.setdefault(row["question_id"], []).append(located)
    return solutions_by_question


def labels_of_states(
    states: pa.Table, labels: Mapping[str, Sequence[Labels]], solutions: pa.Table
) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
    """Labels, number of steps and correctness of each solution that has states, for `checked_consensus_counts`."""
    correct = _correct_by_solution(solutions)
    usable = states.filter(pc.is_null(states["error"]))
    for solution_id, num_steps in zip(usable["solution_id"].to_pylist(), usable["num_steps"].to_pylist(), strict=True):
        yield labels.get(solution_id, []), num_steps, correct.get(solution_id)


def _correct_by_solution(solutions: pa.Table) -> dict[str, bool | None]:
    """Whether each solution's answer is right, without making Python objects of the texts."""
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    solution_ids = pc.struct_field(flat, "solution_id").to_pylist()
    return dict(zip(solution_ids, pc.struct_field(flat, "correct").to_pylist(), strict=True))


def _accuracy_by_solution(solutions: pa.Table) -> dict[str, float | None]:
    """For each solution the share of its row's answers that are right; None where there is no answer.

    By row, not by question: the solutions of a search tree were not drawn from the policy, as its first step's
    advantage supposes.
    """
    # In Arrow alone: as Python objects the solutions' texts would take gigabytes.
    lists = solutions["solutions"].combine_chunks()
    flat = pc.list_flatten(lists)
    rows = pc.list_parent_indices(lists)
    answers = pa.table({"row": rows, "correct": pc.struct_field(flat, "correct").cast(pa.float64())})
    means = answers.group_by("row").aggregate([("correct", "mean")])
    accuracy_by_row = dict(zip(means["row"].to_pylist(), means["correct_mean"].to_pylist(), strict=True))
    accuracy_by_solution: dict[str, float | None] = {}
    for solution_id, row in zip(pc.struct_field(flat, "solution_id").to_pylist(), rows.to_pylist(), strict=True):
        accuracy_by_solution[solution_id] = accuracy_by_row[row]
    return accuracy_by_solution


# In the worker: rows and states -> tensors


@dataclass(frozen=True)
class TwoTowerExample:
    """The constants of some of a question's solutions: states and summaries of all tags, text log-odds, targets and
    weights; and of each solution its number of tags and whether its answer is right.

    A solution's labelled tags share a weight of 1; the others have none.
    """

    states_TD: "torch.Tensor"
    summaries_TD: "torch.Tensor"
    log_odds_T: "torch.Tensor"
    targets_T: "torch.Tensor"
    weights_T: "torch.Tensor"
    tags_per_solution: list[int]
    correct: list[bool]


class StoredSolution(NamedTuple):
    """What is stored of a solution: states and summaries of its tags, and the text's log-odds."""

    states_TD: "torch.Tensor"
    summaries_TD: "torch.Tensor"
    log_odds_T: "torch.Tensor"


class StatesReader:
    """States of solutions by their places; the row groups that were read last stay in memory."""

    def __init__(self, files: pa.Table, most_bytes: float) -> None:
        self._reader = RowGroupReader([(row["table"], row["name"]) for row in files.to_pylist()])
        self._cache: Cache[list[StoredSolution]] = Cache(most_bytes)

    def read(
        self,
        question: Mapping[str, Any],
        solutions: Sequence[int],
    ) -> TwoTowerExample:
        """The example of a question's row (`SCHEMA`) and some of its solutions.

        Raises ValueError for states that are not finite.
        """
        stored: list[StoredSolution] = []
        for number in solutions:
            file, row_group, row = question["places"][number]
            stored.append(self._row_group(file, row_group)[row])
        if not all(bool(tensor.isfinite().all()) for tensor in chain.from_iterable(stored)):
            raise ValueError(
                f"the states of question {question['question_id']!r} hold NaN or infinity; compute the states again "
                "(in float32 or bfloat16)"
            )
        return _example(question, solutions, stored)

    def _row_group(self, file: int, row_group: int) -> list[StoredSolution]:
        rows = self._cache.get((file, row_group))
        if rows is None:
            table = self._reader.read(
                file,
                row_group,
                _STATES_COLUMNS,
            )
            rows = list(map(_stored_solution, table.to_pylist()))
            self._cache.put((file, row_group), rows, table.nbytes)
        return rows


def _stored_solution(row: Mapping[str, Any]) -> StoredSolution:
    import torch

    from medmm_ray.reward_model.states import from_bytes

    shape = (row["num_steps"], row["hidden_size"], row["dtype"])
    return StoredSolution(
        from_bytes(row["states"], *shape), from_bytes(row["summaries"], *shape), torch.tensor(row["text_log_odds"])
    )


def _example(
    question: Mapping[str, Any], solutions: Sequence[int], stored: Sequence[StoredSolution]
) -> TwoTowerExample:
    """Some of a question's solutions as tensors."""
    import torch

    target_values: list[float] = []
    weights: list[float] = []
    for number in solutions:
        step_targets = question["targets"][number]
        num_labelled = sum(target is not None for target in step_targets)
        for target in step_targets:
            target_values.append(0.0 if target is None else target)
            weights.append(0.0 if target is None else 1 / num_labelled)
    return TwoTowerExample(
        states_TD=torch.cat([solution.states_TD for solution in stored]),
        summaries_TD=torch.cat([solution.summaries_TD for solution in stored]),
        log_odds_T=torch.cat([solution.log_odds_T for solution in stored]),
        targets_T=torch.tensor(target_values),
        weights_T=torch.tensor(weights),
        tags_per_solution=[len(solution.states_TD) for solution in stored],
        correct=[question["correct"][number] for number in solutions],
    )


def concatenated(examples: Sequence[TwoTowerExample]) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """states_TD, summaries_TD and text log_odds_T of several questions, one after another."""
    import torch

    states: list[torch.Tensor] = []
    summaries: list[torch.Tensor] = []
    log_odds: list[torch.Tensor] = []
    for example in examples:
        states.append(example.states_TD)
        summaries.append(example.summaries_TD)
        log_odds.append(example.log_odds_T)
    return torch.cat(states), torch.cat(summaries), torch.cat(log_odds)


def sampled_parts(
    units: Units,
    candidates: Sequence[int],
    max_tags: int,
    seed: int,
) -> list[Part]:
    """Some units that have about `max_tags` tags together; of at least `MIN_SAMPLED` units their first solutions,
    where whole ones would be fewer."""
    num_tags = max(1, units.num_tokens(map(units.whole, candidates)))
    num_whole = max(1, max_tags * len(candidates) // num_tags)
    num_units = min(len(candidates), max(num_whole, MIN_SAMPLED))
    parts: list[Part] = []
    for unit in random.Random(seed).sample(candidates, num_units):
        solutions = units.whole(unit).solutions
        if num_units > num_whole:
            solutions = solutions[: max(1, len(solutions) * num_whole // num_units)]
        parts.append(Part(unit, solutions))
    return parts


def positive_rate(targets_of_questions: Iterable[Sequence[Sequence[Target]]]) -> float:
    """The share of right steps among the targets of questions' solutions, as the loss weighs them; 0 without any."""
    positive = 0.0
    total = 0
    for targets_of_question in targets_of_questions:
        for step_targets in targets_of_question:
            labelled = [target for target in step_targets if target is not None]
            positive += sum(labelled) / len(labelled)
            total += 1
    return positive / total if total else 0.0


def class_weights(rate: float) -> tuple[float, float]:
    """Factors on the loss of right and of wrong steps by which both classes weigh the same, and all together as before.

    `rate` is the `positive_rate`, strictly between 0 and 1.
    """
    return 0.5 / rate, 0.5 / (1.0 - rate)
