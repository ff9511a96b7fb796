"""What is noted of tables while they pass, part by part and without their texts, into the files that are counted."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels, Question, Solutions, arrow_schema
from medmm_ray.stats.clusters import ClusterNames
from medmm_ray.stats.grouped_stats import easy_first
from medmm_ray.stats.label_arrays import drop_texts, encode_labels
from medmm_ray.steps.audit.config import AuditConfig
from medmm_ray.steps.audit.yields import Yields

UNKNOWN = "unknown"
"""Difficulty and modality of what is not in the table of questions."""
CLUSTER = "cluster"
"""Column of the name of the question's cluster, by which all tables are sorted."""


def _encoded(labels: pa.Table) -> pa.Table:
    """Labels without texts (`encode_labels`), with their question."""
    return encode_labels(labels).append_column("question_id", labels["question_id"])


_QUESTION = arrow_schema(Question)
_CLUSTER = pa.field(CLUSTER, pa.string())
QUESTIONS = pa.schema(
    [_QUESTION.field(name) for name in ("question_id", "split", "modality", "difficulty", "image_ids", "error")]
).append(_CLUSTER)
SOLUTIONS = drop_texts(arrow_schema(Solutions).empty_table()).schema.append(_CLUSTER)
LABELS = _encoded(arrow_schema(Labels).empty_table()).schema.append(_CLUSTER)


class Reading:
    """Passes tables on part by part, without texts; notes costs, names, and the labels that `Yields` drew."""

    def __init__(self, config: AuditConfig, clusters: ClusterNames) -> None:
        self._clusters = clusters
        self.yields = Yields(config.yield_solutions, config.after_first_error)
        self.costs: dict[str, float] = {"solutions": 0.0}
        """US dollars by table."""
        self.sources: set[str] = set()
        self.groups: dict[tuple[str, str], None] = {}
        """Modality and difficulty of usable questions, in the order in which they come."""
        self._names: dict[str, set[str]] = {"difficulty": {UNKNOWN}, "modality": {UNKNOWN}}

    def group_names(self) -> dict[str, Sequence[str]]:
        """The difficulties and the modalities of the questions that were read."""
        return {column: sorted(names, key=easy_first) for column, names in self._names.items()}

    def questions(self, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Questions, without their texts."""
        for part in parts:
            for column, names in self._names.items():
                names.update(pc.unique(part[column]).to_pylist())
            usable = part.filter(pc.is_null(part["error"]))
            # By one thread: the order of several is not always the same.
            groups = usable.group_by(["modality", "difficulty"], use_threads=False).aggregate([])
            pairs = zip(groups["modality"].to_pylist(), groups["difficulty"].to_pylist(), strict=True)
            self.groups |= dict.fromkeys(pairs)
            yield self._with_cluster(part)

    def solutions(self, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """What the policy sampled."""
        for part in parts:
            # The sum of no row is null.
            self.costs["solutions"] += pc.sum(part["cost"]).as_py() or 0.0
            yield from self.tree_solutions([part])

    def tree_solutions(self, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Solutions; what trees cost is no figure of the report's."""
        for part in parts:
            rows = drop_texts(part)
            self.yields.offer(rows)
            yield self._with_cluster(rows)

    def labels(self, tables: Mapping[str, Iterable[pa.Table]]) -> Iterator[pa.Table]:
        """The labels of all tables."""
        for table, parts in tables.items():
            for part in parts:
                self.costs[table] = self.costs.get(table, 0.0) + (pc.sum(part["cost"]).as_py() or 0.0)
                self.sources.update(pc.unique(part["source"]).to_pylist())
                self.yields.keep(part)
                yield self._with_cluster(_encoded(part))

    def _with_cluster(self, rows: pa.Table) -> pa.Table:
        return rows.append_column(CLUSTER, self._clusters.column(rows["question_id"]))
