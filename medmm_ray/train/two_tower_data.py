"""What a two-tower model is trained on: questions with their images and targets, and the states of their solutions.

Enters: tables. Leaves: one row a question (`SCHEMA`), and, in the worker, a `TwoTowerExample` for each.

Legend: T tags, D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels, States
from medmm_ray.data.tables import Table
from medmm_ray.stats.targets import Target, targets

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
    }
)
_STATES_COLUMNS = ("solution_id", "num_steps", "hidden_size", "dtype", "states", "summaries", "text_log_odds")


# In the driver: tables -> rows


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
    """One row a training question that has an image, with the targets of its solutions (`SCHEMA`).

    `policy` and `after_first_error` make targets of labels; the `num_references` nearest reference images are taken.
    `correct` says of each solution whether its final answer is right: of one without an answer it is not. A question's
    rows in `solutions`, one a source, become one.
    """
    correct = _correct_by_solution(solutions)
    accuracy = _accuracy_by_solution(solutions)
    targets_by_question = _targets_by_question(states, labels, correct, accuracy, policy, after_first_error)
    reference_uris = _reference_uris(evidence, num_references)
    # An image that could not be read has a row with its error.
    images_by_id = {image["image_id"]: image for image in images.to_pylist() if image["error"] is None}
    rows: list[dict[str, Any]] = []
    for question in questions.to_pylist():
        question_id = question["question_id"]
        question_images = [images_by_id[i] for i in question["image_ids"] if i in images_by_id]
        is_usable = question["split"] == "train" and question["error"] is None
        if not is_usable or not question_images or question_id not in targets_by_question:
            continue
        step_targets = targets_by_question[question_id]
        solution_ids = sorted(step_targets)  # Ray keeps no order of rows, a training needs one
        rows.append(
            {
                "question_id": question_id,
                "diagnosis": question_images[0]["diagnosis"],  # swapped images are of another one
                "image_uris": [image["uri"] for image in question_images],
                "reference_uris": reference_uris.get(question_id, []),
                "solution_ids": solution_ids,
                "correct": [bool(correct.get(solution_id)) for solution_id in solution_ids],
                "targets": [step_targets[solution_id] for solution_id in solution_ids],
            }
        )
    rows.sort(key=lambda row: str(row["question_id"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


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
) -> dict[str, dict[str, list[Target]]]:
    """The targets of each solution that has states and a target, by question and solution."""
    targets_by_question: dict[str, dict[str, list[Target]]] = {}
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
            targets_by_question.setdefault(row["question_id"], {})[solution_id] = step_targets
    return targets_by_question


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
    """One question's constants: states and summaries of all its tags, text log-odds, targets and weights; and of each
    solution its number of tags and whether its answer is right.

    A solution's labelled tags share a weight of 1; the others have none.
    """

    states_TD: "torch.Tensor"
    summaries_TD: "torch.Tensor"
    log_odds_T: "torch.Tensor"
    targets_T: "torch.Tensor"
    weights_T: "torch.Tensor"
    tags_per_solution: list[int]
    correct: list[bool]

    def take(self, solutions: Sequence[int]) -> "TwoTowerExample":
        """The constants of some of the solutions, by their places."""
        import torch

        if len(solutions) == len(self.tags_per_solution):
            return self
        starts = [0, *accumulate(self.tags_per_solution)]
        tags_T = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in solutions])
        return TwoTowerExample(
            states_TD=self.states_TD[tags_T],
            summaries_TD=self.summaries_TD[tags_T],
            log_odds_T=self.log_odds_T[tags_T],
            targets_T=self.targets_T[tags_T],
            weights_T=self.weights_T[tags_T],
            tags_per_solution=[self.tags_per_solution[place] for place in solutions],
            correct=[self.correct[place] for place in solutions],
        )


def load_examples(uris: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[list[TwoTowerExample], str]:
    """An example for each row, with the states of its solutions out of several tables; and the states' dtype.

    Raises ValueError for tables of several dtypes, and for states that are not finite.
    """
    solution_ids: set[str] = set()
    for row in rows:
        solution_ids.update(row["solution_ids"])
    states_by_solution, dtypes = _read_states(uris, solution_ids)
    if len(dtypes) != 1:
        raise ValueError(
            f"{', '.join(uris)}: states of the dtypes {sorted(dtypes)}; expected one text tower's, of one dtype"
        )
    examples: list[TwoTowerExample] = []
    for row in rows:
        examples.append(_example(row, [states_by_solution[solution_id] for solution_id in row["solution_ids"]]))
    _check_finite(rows, examples)
    return examples, dtypes.pop()


def _read_states(uris: Sequence[str], solution_ids: set[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The rows of these solutions, and the dtypes that they have. Batch by batch: a table may have millions of rows."""
    states_by_solution: dict[str, dict[str, Any]] = {}
    dtypes: set[str] = set()
    for uri in uris:
        for batch in Table(uri, States).to_arrow(list(_STATES_COLUMNS)).to_batches():
            for row in batch.to_pylist():
                if row["solution_id"] in solution_ids:
                    states_by_solution[row["solution_id"]] = row
                    dtypes.add(row["dtype"])
    return states_by_solution, dtypes


def _example(row: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> TwoTowerExample:
    """A question's row, and its solutions' rows of states in the same order, as tensors."""
    import torch

    from medmm_ray.reward_model.states import from_bytes

    step_states: list[torch.Tensor] = []
    summaries: list[torch.Tensor] = []
    text_log_odds: list[float] = []
    for state in states:
        shape = (state["num_steps"], state["hidden_size"], state["dtype"])
        step_states.append(from_bytes(state["states"], *shape))
        summaries.append(from_bytes(state["summaries"], *shape))
        text_log_odds += state["text_log_odds"]
    target_values: list[float] = []
    weights: list[float] = []
    for step_targets in row["targets"]:
        num_labelled = sum(target is not None for target in step_targets)
        for target in step_targets:
            target_values.append(0.0 if target is None else target)
            weights.append(0.0 if target is None else 1 / num_labelled)
    return TwoTowerExample(
        states_TD=torch.cat(step_states),
        summaries_TD=torch.cat(summaries),
        log_odds_T=torch.tensor(text_log_odds),
        targets_T=torch.tensor(target_values),
        weights_T=torch.tensor(weights),
        tags_per_solution=[state["num_steps"] for state in states],
        correct=row["correct"],
    )


def _check_finite(rows: Sequence[Mapping[str, Any]], examples: Sequence[TwoTowerExample]) -> None:
    broken_ids: list[str] = []
    for row, example in zip(rows, examples, strict=True):
        tensors = (example.states_TD, example.summaries_TD, example.log_odds_T)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            broken_ids.append(row["question_id"])
    if broken_ids:
        raise ValueError(
            f"the states of {len(broken_ids)} of {len(rows)} questions hold NaN or infinity: {broken_ids[:10]}; "
            "compute the states again (in float32 or bfloat16)"
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


def positive_rate(examples: Sequence[TwoTowerExample]) -> float:
    """The share of right steps among the targets of these questions, as the loss weighs them; 0 without any."""
    positive = sum(float((example.weights_T * example.targets_T).sum()) for example in examples)
    total = sum(float(example.weights_T.sum()) for example in examples)
    return positive / total if total else 0.0


def class_weights(rate: float) -> tuple[float, float]:
    """Factors on the loss of right and of wrong steps by which both classes weigh the same, and all together as before.

    `rate` is the `positive_rate`, strictly between 0 and 1.
    """
    return 0.5 / rate, 0.5 / (1.0 - rate)
