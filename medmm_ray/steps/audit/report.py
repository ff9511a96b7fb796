"""The dataset report: what `audit` hands to the page, to `evaluate` and to ``dataset_report.json``."""

from dataclasses import dataclass

from medmm_ray.config import JsonObject
from medmm_ray.stats.agreement import PairAgreement
from medmm_ray.stats.balance import SourceBalance, balance_of
from medmm_ray.stats.gates import Gate
from medmm_ray.steps.audit.cost import CostFigures
from medmm_ray.steps.audit.leakage import LeakageCheck
from medmm_ray.steps.audit.sampling import Coverage, SamplingFigures, StepCounts, TreeFigures
from medmm_ray.steps.audit.yields import PolicyYield


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """What the manifest of a complete table or artifact says."""

    rows: int
    seconds: float
    cost: float
    figures: dict[str, float]
    created: str


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What the labels are worth before anything is trained on them.

    Every share is in [0, 1]; every figure about the whole that rests on the expert's queue is weighted by
    1 / inclusion probability.
    """

    title: str
    config: JsonObject
    """The settings of `AuditConfig` that made the figures."""
    missing: list[str]
    """Tables that were not complete."""
    source: str | None
    """The label source that speaks for the dataset in balance and calibration; None without labels."""
    coverage: Coverage
    sampling: SamplingFigures
    trees: TreeFigures
    steps: StepCounts
    balance: list[SourceBalance]
    agreement: list[PairAgreement]
    policies: list[PolicyYield]
    leakage: list[LeakageCheck]
    cost: CostFigures
    errors: dict[str, dict[str, int]]
    """Failed rows by table and kind."""
    tables: dict[str, TableEntry]
    gates: list[Gate]

    @property
    def speaking_balance(self) -> SourceBalance | None:
        """The balance of the source that speaks for the dataset."""
        return balance_of(self.balance, self.source)

    @property
    def judge_expert(self) -> PairAgreement | None:
        """The agreement of judge and expert, if both label any step."""
        for pair in self.agreement:
            if (pair.first, pair.second) == ("judge", "expert"):
                return pair
        return None
