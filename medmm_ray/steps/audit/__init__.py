"""Tables -> the dataset report: what the labels are worth before anything is trained on them.

Enters: questions, images, solutions, labels of any sources, the expert's queue, what the run says of itself; any of
them may still be missing, and its figures then are. Leaves: an `AuditReport` (``dataset_report.json``): balance,
calibration by difficulty, coverage, step counts, agreement, leakage, sampling, label policies, cost, errors, and the
quality gates.

Measured: 10,000 questions x 64 solutions x 8 steps with four label sources take 14 s on one core and 1.5 GB.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import identity
from medmm_ray.data.records import Labels, Solutions, arrow_schema
from medmm_ray.data.tables import Manifest
from medmm_ray.engines.llm.ledger import Ledger
from medmm_ray.stats.agreement import agreement, queued_steps
from medmm_ray.stats.balance import balance
from medmm_ray.stats.grouped_stats import Groups, Resampling, easy_first
from medmm_ray.stats.label_arrays import WRONG, Codes, Steps, drop_texts, encode_labels, source_labels, steps_of
from medmm_ray.steps.audit.config import AuditConfig
from medmm_ray.steps.audit.cost import cost_figures
from medmm_ray.steps.audit.gates import GateError, gates_of, require
from medmm_ray.steps.audit.leakage import leakage
from medmm_ray.steps.audit.report import AuditReport, TableEntry
from medmm_ray.steps.audit.sampling import coverage, sampling, step_counts, trees
from medmm_ray.steps.audit.yields import Yields

VERSION = 2  # of what a step makes: raise it when the same config makes something else
__all__ = ["AuditConfig", "AuditReport", "GateError", "audit", "require"]


def audit(
    config: AuditConfig,
    *,
    questions: pa.Table,
    images: pa.Table,
    solutions: Iterable[pa.Table],
    labels: Mapping[str, Iterable[pa.Table]],
    tree_solutions: Iterable[pa.Table] = (),
    review_queue: pa.Table | None = None,
    evidence: Iterable[pa.Table] = (),
    manifests: Mapping[str, Manifest] | None = None,
    ledgers: Mapping[str, Ledger] | None = None,
    missing: Sequence[str] = (),
) -> AuditReport:
    """The report. `solutions`, `tree_solutions`, `evidence` and each table of `labels` come in parts, held only while
    they are read. What the policy was asked for and how often it is right is said of `solutions` alone, all else of
    both.

    `manifests` are those of the complete tables, by name; `ledgers` those of the run's APIs, by model;
    `missing` names the tables that are not there yet.
    """
    sampled_rows = _without_texts(solutions)
    tree_rows = _without_texts(tree_solutions)
    # The sum of no row is null.
    costs = {"solutions": pc.sum(sampled_rows["cost"]).as_py() or 0.0}
    sampled = _grouped(questions, sampled_rows)
    solved = sampled
    # Most runs have no trees: a second copy of all solutions would be half of what the report takes.
    if tree_rows.num_rows:
        solved = _grouped(questions, pa.concat_tables([sampled_rows, tree_rows]))
    del sampled_rows
    steps, groups = solved.steps, solved.groups
    # Texts are let go part by part: what stays of a label row is one code a step, and the rows that `yields` samples.
    yields = Yields(steps, config.yield_solutions, config.after_first_error)
    encoded_parts: list[pa.Table] = []
    for table, parts in labels.items():
        for part in parts:
            cost_of_part = pc.sum(part["cost"]).as_py() or 0.0
            costs[table] = costs.get(table, 0.0) + cost_of_part
            yields.keep(part)
            encoded_parts.append(encode_labels(part))
    no_labels = encode_labels(arrow_schema(Labels).empty_table())
    by_source = source_labels(steps, _concat(encoded_parts, no_labels))
    codes = {source: of_source.codes for source, of_source in by_source.items()}
    queue = None
    if review_queue is not None and review_queue.num_rows:
        queue = queued_steps(steps, review_queue)
    resampling = Resampling(config.bootstrap_samples, config.seed)
    manifests = manifests or {}
    errors: dict[str, dict[str, int]] = {}
    tables: dict[str, TableEntry] = {}
    for name, manifest in manifests.items():
        tables[name] = _table_entry(manifest)
        if manifest.errors:
            errors[name] = manifest.errors
    report = AuditReport(
        title=config.title,
        config=identity(config),
        missing=list(missing),
        source=_speaking_source(config, codes),
        coverage=coverage(questions, images, solved.table),
        sampling=sampling(sampled.table, sampled.steps, sampled.correct, sampled.groups, resampling),
        trees=trees(tree_rows),
        steps=step_counts(steps, config.usual_steps, resampling),
        balance=balance(steps, by_source, groups, queue, resampling),
        agreement=agreement(steps, codes, groups, queue, resampling),
        policies=yields.figures(solved.correct),
        leakage=leakage(questions, images, evidence),
        cost=cost_figures(costs, manifests, ledgers or {}, config.dollars_per_reviewed_step),
        errors=errors,
        tables=tables,
        gates=[],
    )
    return replace(report, gates=gates_of(config, report))


def _speaking_source(config: AuditConfig, codes: Mapping[str, Codes]) -> str | None:
    """The first of the config's sources that calls a step right or wrong."""
    for source in config.sources:
        if source in codes and (codes[source] >= WRONG).any():
            return source
    return None


def _table_entry(manifest: Manifest) -> TableEntry:
    return TableEntry(
        rows=manifest.rows,
        seconds=manifest.seconds,
        cost=manifest.cost,
        figures=manifest.figures,
        created=manifest.created,
    )


@dataclass(frozen=True)
class _GroupedSolutions:
    """Solutions without texts with their steps, whether each is right, and the groups that it belongs to."""

    table: pa.Table
    steps: Steps
    correct: Codes
    groups: dict[str, Groups]


def _grouped(questions: pa.Table, table: pa.Table) -> _GroupedSolutions:
    table = table.combine_chunks().sort_by("question_id")  # resamples depend on the order
    steps = steps_of(table)
    correct = _correct(table)
    groups = _groups(questions, table, steps, correct)
    return _GroupedSolutions(table, steps, correct, groups)


def _without_texts(parts: Iterable[pa.Table]) -> pa.Table:
    empty = drop_texts(arrow_schema(Solutions).empty_table())
    return _concat(list(map(drop_texts, parts)), empty)


def _concat(parts: Sequence[pa.Table], empty: pa.Table) -> pa.Table:
    # Arrow joins one table at least.
    if not parts:
        return empty
    return pa.concat_tables(parts).combine_chunks()


def _correct(solutions: pa.Table) -> Codes:
    """Whether each solution's answer is right: RIGHT, WRONG, or -1 where no answer was found."""
    flat = pc.list_flatten(solutions["solutions"].combine_chunks())
    flags = pc.cast(flat.field("correct"), pa.int8())
    return np.asarray(pc.fill_null(flags, -1), dtype=np.int8)


def _groups(questions: pa.Table, solutions: pa.Table, steps: Steps, correct: Codes) -> dict[str, Groups]:
    """The solutions by answer, difficulty and modality."""
    # -1, 0 and 1 are numbered from 0.
    answer = Groups(("no answer", "wrong", "right"), correct.astype(np.int64) + 1)
    groups = {"answer": answer}
    solved_ids = solutions["question_id"].combine_chunks()
    question_row = pc.index_in(solved_ids, questions["question_id"].combine_chunks())
    for column in ("difficulty", "modality"):
        # Solutions of a question that is not in the table (curate dropped it) form a group of their own.
        values = questions[column].combine_chunks().take(question_row)
        values = pc.fill_null(values, "unknown")
        names = sorted(values.unique().to_pylist(), key=easy_first)
        number = pc.index_in(values, pa.array(names, pa.string()))
        row_member = np.asarray(number, dtype=np.int64)
        groups[column] = Groups(names, row_member[steps.row])
    return groups
