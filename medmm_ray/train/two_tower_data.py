"""What a two-tower model is trained on: questions with their images and targets, and the constants of their solutions.

Enters: tables. Leaves: one row a question (`SCHEMA`), and, in the worker, a `TwoTowerExample` for each.

Legend: T tags, D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels, States
from medmm_ray.data.tables import Table
from medmm_ray.stats.targets import Target, targets

if TYPE_CHECKING:
    import torch

    from medmm_ray.train.two_tower import TwoTowerConfig

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


def questions_with_images(
    config: "TwoTowerConfig",
    states: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table,
) -> pa.Table:
    """One row a training question that has an image, with the targets of its solutions (`SCHEMA`).

    `correct` says of each solution whether its final answer is right: of one without an answer it is not. A question's
    rows in `solutions`, one a source, become one.
    """
    by_image = {i["image_id"]: i for i in images.to_pylist() if i["error"] is None}
    references = {
        row["question_id"]: [image["uri"] for image in row["images"][: config.num_references]]
        for row in evidence.to_pylist()
        if row["error"] is None
    }
    correct, accuracy = _correct(solutions), _accuracy(solutions)
    aims: dict[str, dict[str, list[Target]]] = {}
    for row in states.to_pylist():
        if row["error"] is None:
            name = row["solution_id"]
            own = targets(
                config.label_policy,
                labels.get(name, []),
                row["num_steps"],
                config.after_first_error,
                correct.get(name),
                accuracy.get(name),
            )
            if any(aim is not None for aim in own):
                aims.setdefault(row["question_id"], {})[name] = own
    rows = []
    for question in questions.to_pylist():
        name = question["question_id"]
        own_images = [by_image[i] for i in question["image_ids"] if i in by_image]
        if question["split"] == "train" and question["error"] is None and own_images and name in aims:
            ids = sorted(aims[name])
            rows.append(
                {
                    "question_id": name,
                    "diagnosis": own_images[0]["diagnosis"],
                    "image_uris": [image["uri"] for image in own_images],
                    "reference_uris": references.get(name, []),
                    "solution_ids": ids,
                    "correct": [bool(correct.get(i)) for i in ids],
                    "targets": [aims[name][i] for i in ids],
                }
            )
    return pa.Table.from_pylist(sorted(rows, key=lambda r: str(r["question_id"])), schema=SCHEMA)


def labels_of_states(
    states: pa.Table, labels: Mapping[str, Sequence[Labels]], solutions: pa.Table
) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
    """Of each solution that has states: its labels, its number of steps, whether its answer is right."""
    correct = _correct(solutions)
    held = states.filter(pc.is_null(states["error"]))
    for name, num_steps in zip(held["solution_id"].to_pylist(), held["num_steps"].to_pylist(), strict=True):
        yield labels.get(name, []), num_steps, correct.get(name)


def _correct(solutions: pa.Table) -> dict[str, bool | None]:
    """Of each solution whether its answer is right, without making Python objects of the texts."""
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    ids, correct = (pc.struct_field(flat, name).to_pylist() for name in ("solution_id", "correct"))
    return dict(zip(ids, correct, strict=True))


def _accuracy(solutions: pa.Table) -> dict[str, float | None]:
    """Of each solution what share of its row's answers is right; None where there is no answer.

    Of its row, not of its question: what a search tree found are no draws of the policy.
    """
    lists = solutions["solutions"].combine_chunks()
    row, flat = pc.list_parent_indices(lists), pc.list_flatten(lists)
    correct = pc.struct_field(flat, "correct").cast(pa.float64())
    means = pa.table({"row": row, "correct": correct}).group_by("row").aggregate([("correct", "mean")])
    of_row = dict(zip(means["row"].to_pylist(), means["correct_mean"].to_pylist(), strict=True))
    ids = pc.struct_field(flat, "solution_id").to_pylist()
    return {name: of_row[number] for name, number in zip(ids, row.to_pylist(), strict=True)}


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
    lengths: list[int]
    correct: list[bool]


def load_examples(uris: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[list[TwoTowerExample], str]:
    """The states of each row's solutions, in its order, out of several tables, and their dtype.

    Raises ValueError for tables of several dtypes, and for states that are not finite.
    """
    import torch

    from medmm_ray.reward_model.states import from_bytes

    wanted = {name for row in rows for name in row["solution_ids"]}
    held: dict[str, dict[str, Any]] = {}
    dtypes = set()
    columns = ["solution_id", "num_steps", "hidden_size", "dtype", "states", "summaries", "text_log_odds"]
    for uri in uris:
        for batch in Table(uri, States).to_arrow(columns).to_batches():
            for row in batch.to_pylist():
                if row["solution_id"] in wanted:
                    held[row["solution_id"]] = row
                    dtypes.add(row["dtype"])
    if len(dtypes) != 1:
        raise ValueError(
            f"{', '.join(uris)}: states of the dtypes {sorted(dtypes)}; expected one text tower's, of one dtype"
        )
    cached = []
    for row in rows:
        own = [held[name] for name in row["solution_ids"]]
        aims = row["targets"]
        labelled = [sum(aim is not None for aim in a) for a in aims]
        cached.append(
            TwoTowerExample(
                torch.cat([from_bytes(s["states"], s["num_steps"], s["hidden_size"], s["dtype"]) for s in own]),
                torch.cat([from_bytes(s["summaries"], s["num_steps"], s["hidden_size"], s["dtype"]) for s in own]),
                torch.tensor([value for s in own for value in s["text_log_odds"]]),
                torch.tensor([0.0 if aim is None else aim for a in aims for aim in a]),
                torch.tensor([0.0 if aim is None else 1 / n for a, n in zip(aims, labelled, strict=True) for aim in a]),
                [s["num_steps"] for s in own],
                row["correct"],
            )
        )
    _check_finite(rows, cached)
    return cached, dtypes.pop()


def _check_finite(rows: Sequence[Mapping[str, Any]], cached: Sequence[TwoTowerExample]) -> None:
    broken = [
        row["question_id"]
        for row, own in zip(rows, cached, strict=True)
        if not all(bool(part.isfinite().all()) for part in (own.states_TD, own.summaries_TD, own.log_odds_T))
    ]
    if broken:
        raise ValueError(
            f"the states of {len(broken)} of {len(rows)} questions hold NaN or infinity: {broken[:10]}; compute the "
            "states again (in float32 or bfloat16)"
        )


def positive_rate(cached: Sequence[TwoTowerExample]) -> float:
    """The share of right among the targets of these questions, as the loss weighs them; 0 without any."""
    right = sum(float((c.weights_T * c.targets_T).sum()) for c in cached)
    total = sum(float(c.weights_T.sum()) for c in cached)
    return right / total if total else 0.0


def class_weights(share: float) -> tuple[float, float]:
    """Factors on the loss of right and of wrong steps by which both classes weigh the same, and all together as before.

    `share` is `positive_rate`, strictly between 0 and 1.
    """
    return 0.5 / share, 0.5 / (1.0 - share)
