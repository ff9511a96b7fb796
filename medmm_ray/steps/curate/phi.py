"""Questions with protected health information: which kinds of identifiers each has, and what becomes of it.

Identifiers themselves are in no table, figure or log: only their kinds, beside the question's id.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from medmm_ray.data.records import Question
from medmm_ray.steps.curate.config import CurateConfig

if TYPE_CHECKING:
    from ray.data import Dataset

PhiKinds = Mapping[str, Sequence[str]]
"""The kinds of identifiers in each question that has some, by its id."""


def text_of(question: str, options: Sequence[str], answer: str) -> str:
    """All words of a question, a line each, so that no identifier is read across two of them."""
    return "\n".join([question, *options, answer])


class PhiWorker:
    """Rows of questions to rows with `question_id` and `kinds`; one in, one out."""

    def __init__(self) -> None:
        from medmm_ray.engines.phi_scanner import PhiScanner

        self.scanner = PhiScanner()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One batch."""
        kinds = []
        columns = ("question", "options", "answer")
        for row in batch.select(columns).to_pylist():
            kinds.append(self.scanner.kinds(text_of(**row)))
        return pa.table({"question_id": batch["question_id"], "kinds": pa.array(kinds, pa.list_(pa.string()))})


def scan(ds: "Dataset", config: CurateConfig) -> "Dataset":
    """Rows of questions to rows with `question_id` and `kinds`, in workers."""
    import ray

    return ds.map_batches(
        PhiWorker,
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=config.num_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.phi_workers),
    )


def kinds_of(scanned: pa.Table) -> dict[str, list[str]]:
    """Rows of `scan` as the kinds of each question that has some."""
    kinds = {}
    for row in scanned.sort_by("question_id").to_pylist():
        if row["kinds"]:
            kinds[row["question_id"]] = row["kinds"]
    return kinds


def without_phi(
    questions: Sequence[Question],
    kinds: PhiKinds,
    config: CurateConfig,
    official_ids: Collection[str],
    figures: Counter[str],
) -> list[Question]:
    """The questions less those with identifiers, where they are dropped; each is counted by its kinds.

    Official tests stay as published: what is found in them is counted apart.
    """
    clean = []
    for question in questions:
        of_question = kinds.get(question.question_id, ())
        is_official = question.question_id in official_ids
        for kind in of_question:
            figures[f"phi_official_test_{kind}" if is_official else f"phi_{kind}"] += 1
        if not of_question or is_official or config.phi != "drop":
            clean.append(question)
    if kinds:
        figures["questions_with_phi"] = sum(question.question_id in kinds for question in questions)
        figures["questions_phi_dropped"] = len(questions) - len(clean)
    return clean
