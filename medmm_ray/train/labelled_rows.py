"""Tables -> what reward models are trained on, some questions at a time: the driver never holds a table.

Enters: questions, evidence, solutions and labels of all sources, part by part. Leaves: rows for `launch.fit`, in the
order of the questions' ids.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Evidence, Image, Labels, Question, Solutions, arrow_schema
from medmm_ray.data.sorted_rows import SortedRows, listed_rows, scratch_folder, sort_rows, sort_tables, windows
from medmm_ray.stats.targets import checked_consensus_counts
from medmm_ray.train.text_prm_data import RightSteps, group_labels, labelled_questions, labels_of_solutions
from medmm_ray.train.two_tower_data import LOCATED, labels_of_states, located_states, questions_with_images

_QUESTIONS = arrow_schema(Question)
_LABELS = arrow_schema(Labels)
_DOCUMENTS = pa.schema([arrow_schema(Evidence).field(name) for name in ("question_id", "documents", "error")])
_SOLUTIONS = pa.schema([arrow_schema(Solutions).field(name) for name in ("question_id", "solutions", "error")])

_REFERENCES = pa.schema([arrow_schema(Evidence).field(name) for name in ("question_id", "images", "error")])
_GRADE = pa.schema({"solution_id": pa.string(), "correct": pa.bool_()})
_GRADES = pa.schema({"question_id": pa.string(), "solutions": pa.list_(pa.struct(list(_GRADE)))})


@dataclass(frozen=True)
class LabelRules:
    """How labels become targets, and how much of a question is trained on."""

    policy: str
    after_first_error: str
    max_solutions: int | None
    num_documents: int | None


class LabelledRows:
    """`labelled_questions` of tables that come in parts: some questions at a time, in the order of their ids.

    What is said of all rows (`consensus`, `right_steps`) is there once they were iterated. Raises ValueError where no
    solution has a target.
    """

    def __init__(
        self,
        rules: LabelRules,
        questions: Iterable[pa.Table],
        evidence: Iterable[pa.Table],
        solutions: Iterable[pa.Table],
        labels: Iterable[pa.Table],
    ) -> None:
        self.rules = rules
        self.right_steps = RightSteps()
        self.consensus: dict[str, float] = {}
        """The figures of `checked_consensus_counts`; none with another label policy."""
        self._parts = {
            "questions": (questions, _QUESTIONS),
            "evidence": (evidence, _DOCUMENTS),
            "solutions": (solutions, _SOLUTIONS),
            "labels": (labels, _LABELS),
        }

    def __iter__(self) -> Iterator[pa.Table]:
        rules = self.rules
        num_rows = num_sampled = num_labelled = 0
        with scratch_folder() as folder:
            tables = sort_tables(self._parts, "question_id", folder)
            # Counted, and refused, before the first row is written.
            if rules.policy == "consensus":
                self.consensus = checked_consensus_counts(self._labels(tables))
            for window in windows(tables):
                labels = group_labels([window["labels"]])
                rows = labelled_questions(
                    window["questions"],
                    window["evidence"],
                    window["solutions"],
                    labels,
                    rules.policy,
                    rules.after_first_error,
                    rules.max_solutions,
                    rules.num_documents,
                )
                num_sampled += window["solutions"].num_rows
                num_labelled += len(labels)
                num_rows += rows.num_rows
                # A window of held-out questions has nothing to write.
                if rows.num_rows:
                    self.right_steps.add(rows)
                    yield rows
        if not num_rows:
            raise ValueError(
                f"train_text_prm: label policy {rules.policy!r} gives no target for any training solution "
                f"({num_sampled} questions sampled, {num_labelled} solutions labelled). Look at the labels tables."
            )

    def _labels(self, tables: Mapping[str, SortedRows]) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
        for window in windows(tables):
            labels = group_labels([window["labels"]])
            yield from labels_of_solutions(window["questions"], window["solutions"], labels, self.rules.max_solutions)


@dataclass(frozen=True)
class TwoTowerRules:
    """How labels become targets, and how many reference images are taken."""

    policy: str
    after_first_error: str
    num_references: int


class TwoTowerRows:
    """`questions_with_images` of tables that come in parts: some questions at a time, in the order of their ids.

    `consensus` is there once the rows were iterated. Raises ValueError where there are none.
    """

    def __init__(
        self,
        rules: TwoTowerRules,
        files: pa.Table,
        labels: Iterable[pa.Table],
        questions: Iterable[pa.Table],
        images: Iterable[pa.Table],
        evidence: Iterable[pa.Table],
        solutions: Iterable[pa.Table],
    ) -> None:
        self.rules = rules
        self.consensus: dict[str, float] = {}
        """The figures of `checked_consensus_counts`; none with another label policy."""
        self._images = images
        self._parts = {
            "states": (located_states(files), LOCATED),
            "labels": (labels, _LABELS),
            "questions": (questions, _QUESTIONS),
            "evidence": (evidence, _REFERENCES),
            "solutions": (map(_without_texts, solutions), _GRADES),
        }

    def __iter__(self) -> Iterator[pa.Table]:
        rules = self.rules
        num_rows = num_states = 0
        with scratch_folder() as folder:
            images = sort_rows(self._images, "image_id", arrow_schema(Image), f"{folder}/images")
            tables = sort_tables(self._parts, "question_id", folder)
            tables["images"] = listed_rows(tables["questions"], "image_ids", images, f"{folder}/question_images")
            if rules.policy == "consensus":
                self.consensus = checked_consensus_counts(_labels_of_windows(tables))
            for window in windows(tables):
                rows = questions_with_images(
                    window["states"],
                    group_labels([window["labels"]]),
                    window["questions"],
                    window["images"],
                    window["evidence"],
                    window["solutions"],
                    rules.policy,
                    rules.after_first_error,
                    rules.num_references,
                )
                num_states += window["states"].num_rows
                num_rows += rows.num_rows
                if rows.num_rows:
                    yield rows
        if not num_rows:
            raise ValueError(
                f"train_two_tower: no training question has an image, states and a target ({num_states} states, "
                f"label policy {rules.policy!r}). Look at the tables states and labels."
            )


def _without_texts(solutions: pa.Table) -> pa.Table:
    """Of each solution its id, and whether its answer is right."""
    lists = solutions["solutions"].combine_chunks()
    flat = pc.list_flatten(lists)
    fields = [pc.struct_field(flat, name) for name in _GRADE.names]
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    nested = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, names=_GRADE.names))
    return pa.table({"question_id": solutions["question_id"], "solutions": nested})


def _labels_of_windows(tables: Mapping[str, SortedRows]) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
    for window in windows(tables):
        yield from labels_of_states(window["states"], group_labels([window["labels"]]), window["solutions"])
