"""Tables -> the dataset report: what the labels are worth before anything is trained on them.

Enters: questions, images, solutions, labels of any sources, the expert's queue, what the run says of itself; any of
them may still be missing, and its figures then are. Leaves: an `AuditReport` (``dataset_report.json``): balance,
calibration by difficulty, coverage, step counts, agreement, leakage, sampling, label policies, cost, errors, and the
quality gates.

No table is whole in memory: all are sorted into files by the cluster of their questions, and read side by side, some
clusters at a time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import identity
from medmm_ray.data.sorted_rows import scratch_folder, sort_rows, windows
from medmm_ray.data.tables import Manifest
from medmm_ray.engines.llm.ledger import Ledger
from medmm_ray.stats.agreement import Agreement, LabelledSteps, queued_steps
from medmm_ray.stats.balance import Balance, SourceBalance, balance_of
from medmm_ray.stats.clusters import ClusterNames
from medmm_ray.stats.grouped_stats import Groups
from medmm_ray.stats.label_arrays import Codes, Ints, Steps, source_labels, steps_of
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.audit.config import AuditConfig
from medmm_ray.steps.audit.cost import cost_figures
from medmm_ray.steps.audit.gates import GateError, gates_of, require
from medmm_ray.steps.audit.leakage import leakage
from medmm_ray.steps.audit.reading import CLUSTER, LABELS, QUESTIONS, SOLUTIONS, UNKNOWN, Reading
from medmm_ray.steps.audit.report import AuditReport, TableEntry
from medmm_ray.steps.audit.sampling import CoverageCounts, SamplingCounts, SolvedQuestions, StepCounter, tree_figures

VERSION = 3  # of what a step makes: raise it when the same config makes something else
__all__ = ["AuditConfig", "AuditReport", "GateError", "audit", "require"]


def audit(
    config: AuditConfig,
    *,
    questions: Iterable[pa.Table],
    images: Iterable[pa.Table],
    solutions: Iterable[pa.Table],
    labels: Mapping[str, Iterable[pa.Table]],
    tree_solutions: Iterable[pa.Table] = (),
    review_queue: pa.Table | None = None,
    evidence: Iterable[pa.Table] = (),
    manifests: Mapping[str, Manifest] | None = None,
    ledgers: Mapping[str, Ledger] | None = None,
    missing: Sequence[str] = (),
) -> AuditReport:
    """The report. All tables but the expert's queue come in parts, held only while they are read, some more than once.
    What the policy was asked for and how often it is right is said of `solutions` alone, all else of both.

    `manifests` are those of the complete tables, by name; `ledgers` those of the run's APIs, by model;
    `missing` names the tables that are not there yet.
    """
    manifests = manifests or {}
    with scratch_folder() as folder:
        reading = Reading(config, ClusterNames.of(questions))
        tables = {
            "questions": sort_rows(reading.questions(questions), CLUSTER, QUESTIONS, f"{folder}/questions"),
            "sampled": sort_rows(reading.solutions(solutions), CLUSTER, SOLUTIONS, f"{folder}/sampled"),
            "trees": sort_rows(reading.tree_solutions(tree_solutions), CLUSTER, SOLUTIONS, f"{folder}/trees"),
        }
        # After the solutions, of which some were drawn whose labels are kept.
        tables["labels"] = sort_rows(reading.labels(labels), CLUSTER, LABELS, f"{folder}/labels")
        counts = _Counts(reading, _images_by_modality(images), review_queue)
        for window in windows(tables):
            counts.add(window)
        resampling = Resampling(config.bootstrap_samples, config.seed)
        balances = counts.balance.figures(resampling)
        report = AuditReport(
            title=config.title,
            config=identity(config),
            missing=list(missing),
            source=_speaking_source(config, balances),
            coverage=counts.coverage.figures(),
            sampling=counts.sampling.figures(resampling),
            trees=tree_figures(tables["trees"].batches()),
            steps=counts.steps.figures(config.usual_steps, resampling),
            balance=balances,
            agreement=counts.agreement.figures(resampling),
            policies=reading.yields.figures(),
            leakage=leakage(questions, images, evidence, folder),
            cost=cost_figures(reading.costs, manifests, ledgers or {}, config.dollars_per_reviewed_step),
            errors={name: manifest.errors for name, manifest in manifests.items() if manifest.errors},
            tables={name: _table_entry(manifest) for name, manifest in manifests.items()},
            gates=[],
        )
    return replace(report, gates=gates_of(config, report))


def _speaking_source(config: AuditConfig, balances: Sequence[SourceBalance]) -> str | None:
    """The first of the config's sources that calls a step right or wrong."""
    for source in config.sources:
        balance = balance_of(balances, source)
        if balance is not None and balance.right + balance.wrong:
            return source
    return None


def _images_by_modality(images: Iterable[pa.Table]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in images:
        counts.update(part["modality"].to_pylist())
    return counts


def _table_entry(manifest: Manifest) -> TableEntry:
    return TableEntry(
        rows=manifest.rows,
        seconds=manifest.seconds,
        cost=manifest.cost,
        figures=manifest.figures,
        created=manifest.created,
    )


class _Counts:
    """What the report counts, taken from some questions at a time."""

    def __init__(
        self,
        reading: Reading,
        images: Counter[str],
        review_queue: pa.Table | None,
    ) -> None:
        self.sources = reading.sources
        self.names = reading.group_names()
        self.review_queue = review_queue
        self.coverage = CoverageCounts(reading.groups, images)
        self.sampling = SamplingCounts()
        self.steps = StepCounter()
        self.balance = Balance(self.sources)
        self.agreement = Agreement(self.sources)

    def add(self, window: Mapping[str, pa.Table]) -> None:
        """Count the questions, solutions and labels of a window."""
        questions, sampled_rows, tree_rows = window["questions"], window["sampled"], window["trees"]
        sampled = self._solved(questions, sampled_rows)
        solved = sampled
        if tree_rows.num_rows:
            solved = self._solved(questions, pa.concat_tables([sampled_rows, tree_rows]))
        steps = solved.steps
        by_source = source_labels(steps, window["labels"].combine_chunks(), self.sources)
        queue = None
        if self.review_queue is not None and self.review_queue.num_rows:
            queue = queued_steps(steps, self.review_queue)
        codes = {source: labels.codes for source, labels in by_source.items()}
        labelled = LabelledSteps(steps, codes, solved.groups, queue, solved.cluster_Q)
        self.coverage.add(questions, solved.table)
        self.sampling.add(sampled)
        self.steps.add(steps, solved.cluster_Q)
        self.balance.add(labelled, by_source)
        self.agreement.add(labelled)

    def _solved(self, questions: pa.Table, rows: pa.Table) -> SolvedQuestions:
        # Resamples depend on the order.
        table = rows.combine_chunks().sort_by([(CLUSTER, "ascending"), ("question_id", "ascending")])
        steps = steps_of(table)
        correct = _correct(table)
        return SolvedQuestions(
            table,
            steps,
            correct,
            self._groups(questions, table, steps, correct),
            _clusters(table),
        )

    def _groups(
        self,
        questions: pa.Table,
        solutions: pa.Table,
        steps: Steps,
        correct: Codes,
    ) -> dict[str, Groups]:
        """The solutions by answer, difficulty and modality."""
        # -1, 0 and 1 are numbered from 0.
        answer = Groups(("no answer", "wrong", "right"), correct.astype(np.int64) + 1)
        groups = {"answer": answer}
        solved_ids = solutions["question_id"].combine_chunks()
        question_row = pc.index_in(solved_ids, questions["question_id"].combine_chunks())
        for column, names in self.names.items():
            # Solutions of a question that is not in the table (curate dropped it) form a group of their own.
            values = questions[column].combine_chunks().take(question_row)
            values = pc.fill_null(values, UNKNOWN)
            number = pc.index_in(values, pa.array(names, pa.string()))
            row_member = np.asarray(number, dtype=np.int64)
            groups[column] = Groups(names, row_member[steps.row])
        return groups


def _clusters(solutions: pa.Table) -> Ints:
    """The number of each question's cluster, questions in the order of the table."""
    pairs = solutions.select([CLUSTER, "question_id"]).group_by([CLUSTER, "question_id"], use_threads=False)
    names = pairs.aggregate([])[CLUSTER]
    return np.asarray(pc.index_in(names, names.unique()), dtype=np.int64)


def _correct(solutions: pa.Table) -> Codes:
    """Whether each solution's answer is right: RIGHT, WRONG, or -1 where no answer was found."""
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    flags = pc.cast(flat.field("correct"), pa.int8())
    return np.asarray(pc.fill_null(flags, -1), dtype=np.int8)
