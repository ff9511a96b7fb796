"""Labels by Monte Carlo: continue a solution from a step several times and see how often the answer comes out right.

Enters: solutions, their questions, the judge's labels. Leaves: labels with source "monte_carlo" (`Labels`, nested by
question) for the steps that are decided, the other steps empty; a question without such steps has an empty list. The
value of a step is about the prefix that ends there: num_correct / num_rollouts, and the label is 1 where it exceeds
`threshold`. A continuation that is cut off or states no answer is not wrong: it is not counted, and a prefix of which
none counts has a reason and no label. So has one that could not be continued; only where no step of a solution has a
label is that its row's error. No prompt carries the gold answer. `search` says what is continued and why.

With `stop_early` (the default) a prefix is continued 2, 2, 4, 8 ... times and only until its label is decided. The
label is the same, at a fraction of the tokens, but num_correct / num_rollouts is then too high (a true .25 reads .37,
and would read .46 one by one), so such rows are marked, and targets that need the ratio refuse them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.sorted_rows import SortedRows, sort_rows, windows, write_sorted
from medmm_ray.data.tables import attach
from medmm_ray.engines.generator import Generator, MakeGenerator
from medmm_ray.engines.grader import EquivalenceConfig, MakeGrader
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.vllm_engine import actor_options
from medmm_ray.steps.monte_carlo.actor import RolloutActor
from medmm_ray.steps.monte_carlo.config import MonteCarloConfig

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 3  # of what a step makes: raise it when the same config makes something else
QUESTION_COLUMNS = ["split", "question", "options", "answer", "answer_type"]
__all__ = [
    "QUESTION_COLUMNS",
    "MonteCarloConfig",
    "RolloutActor",
    "by_question",
    "image_uris",
    "judged_rows",
    "monte_carlo",
]


def monte_carlo(
    ds: "Dataset",
    config: MonteCarloConfig,
    *,
    questions: pa.Table | SortedRows,
    judged: pa.Table | SortedRows,
    model: str,
    policy: str,
    evidence: pa.Table | SortedRows | None = None,
    uris: pa.Table | SortedRows | None = None,
    equivalence: EquivalenceConfig | None = None,
    apis: Apis | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels, figures}``, labels a list of `Labels`.

    `judged` are the judge's labels `by_question`; `model` is the checkpoint that continues, `policy` what the annotator
    is called; `evidence` is needed where config.num_documents > 0, `uris` (`image_uris`) where engine.num_images > 0.
    The tables may be `SortedRows`, of which each task reads what it needs. `equivalence` grades open answers as in
    sampling; `apis` is how the run reaches its model.
    """
    ds = attach(ds, questions, "question_id", QUESTION_COLUMNS)
    ds = attach(ds, judged, "question_id", ["judged"])
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    num_images = config.engine.num_images
    if num_images:
        if uris is None:
            raise ValueError(f"num_images={num_images} needs the table images")
        ds = attach(ds, uris, "question_id", ["image_uris"])
    grader = MakeGrader(equivalence or EquivalenceConfig(), apis)
    return ds.map_batches(
        RolloutActor,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "generator": generator,
            "grader": grader,
        },
        **actor_options(config.engine),
    )


def judged_rows(labels: Iterable[pa.Table], folder: str) -> SortedRows:
    """`by_question` of a table that comes in parts, in a file in `folder`.

    It needs question_id, solution_id, annotator, steps and error.
    """
    # Reasons are most of a judge's table, and no continuation reads them.
    rows = sort_rows(map(_without_reasons, labels), "question_id", _LABELS, f"{folder}/labels")
    tables = (by_question(window["labels"]) for window in windows({"labels": rows}))
    judged = write_sorted(tables, "question_id", by_question(_LABELS.empty_table()).schema, f"{folder}/judged")
    rows.delete()
    return judged


_LABELS = pa.schema(
    {
        "question_id": pa.string(),
        "solution_id": pa.string(),
        "annotator": pa.string(),
        "steps": pa.list_(pa.struct({"label": pa.int64(), "confidence": pa.string()})),
        "error": pa.string(),
    }
)


def _without_reasons(labels: pa.Table) -> pa.Table:
    """The columns of `_LABELS`: of a step its label and confidence alone."""
    nested = labels["steps"].combine_chunks()
    entries = nested.flatten()
    step = pa.StructArray.from_arrays(
        [entries.field(name) for name in ("label", "confidence")], ["label", "confidence"]
    )
    lists = pa.ListArray.from_arrays(pc.subtract(nested.offsets, nested.offsets[0]), step)
    place = labels.schema.get_field_index("steps")
    return labels.set_column(place, "steps", lists).select(_LABELS.names)


def by_question(labels: pa.Table) -> pa.Table:
    """One row a question with `judged`: its labels rows without an error, each step as {label, confidence}."""
    has_no_error = pc.is_null(labels["error"])
    labels = labels.filter(has_no_error).combine_chunks()
    # By annotator too: which of two judges comes first must not depend on the order of the rows.
    order = [
        ("question_id", "ascending"),
        ("solution_id", "ascending"),
        ("annotator", "ascending"),
    ]
    labels = labels.sort_by(order)
    # In columns, without a Python object a step: a run has millions.
    lists = labels["steps"].combine_chunks()
    flat_steps = lists.flatten()
    steps = pa.StructArray.from_arrays(
        [
            pc.struct_field(flat_steps, "label"),
            pc.struct_field(flat_steps, "confidence"),
        ],
        names=["label", "confidence"],
    )
    # The sorted lists need not lie in order in memory: offsets are counted anew.
    lengths = np.asarray(pc.list_value_length(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    solution_ids = labels["solution_id"].combine_chunks()
    rows = pa.StructArray.from_arrays(
        [
            solution_ids,
            pa.ListArray.from_arrays(offsets, steps),
        ],
        names=["solution_id", "steps"],
    )
    all_question_ids = labels["question_id"].to_numpy()
    question_ids, first_rows = np.unique(all_question_ids, return_index=True)
    starts = pa.array(np.append(first_rows, labels.num_rows), pa.int32())
    return pa.table(
        {
            "question_id": pa.array(question_ids, pa.string()),
            "judged": pa.ListArray.from_arrays(starts, rows),
        }
    )


def image_uris(
    questions: pa.Table,
    images: pa.Table,
    num_images: int,
) -> pa.Table:
    """One row a question with the uris of its first `num_images` images."""
    image_ids = images["image_id"].to_pylist()
    uri_of = dict(zip(image_ids, images["uri"].to_pylist(), strict=True))
    uris: list[list[str]] = []
    for question_images in questions["image_ids"].to_pylist():
        first_images = question_images[:num_images]
        uris.append([uri_of[image_id] for image_id in first_images])
    return pa.table(
        {
            "question_id": questions["question_id"],
            "image_uris": pa.array(uris, pa.list_(pa.string())),
        }
    )
