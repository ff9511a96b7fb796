"""What APIs and readers were paid for the dataset, US dollars; time on own GPUs is in no table."""

from collections.abc import Mapping
from dataclasses import dataclass

from medmm_ray.data.tables import Manifest
from medmm_ray.engines.llm.ledger import Ledger

BY_API = ("solutions", "judge_labels")
"""Tables whose rows may be paid to an API, through the run's ledgers."""


@dataclass(frozen=True, kw_only=True)
class LedgerFigures:
    """What an API's ledger has booked, US dollars and calls."""

    spent: float
    answers: int
    possibly_paid: float
    lost_calls: int


@dataclass(frozen=True, kw_only=True)
class CostFigures:
    """The cost by table and in all, US dollars.

    `beyond_tables` is what the ledgers (by model) have booked beyond the tables, possibly paid calls included;
    `readers` what the readers' verdicts cost.
    """

    tables: dict[str, float]
    ledgers: dict[str, LedgerFigures]
    beyond_tables: float
    readers: float
    total: float


def cost_figures(
    costs_of_rows: Mapping[str, float],
    manifests: Mapping[str, Manifest],
    ledgers: Mapping[str, Ledger],
    dollars_per_verdict: float = 0.0,
) -> CostFigures:
    """The cost by table and in all, US dollars: `costs_of_rows` are the sums of the rows' own costs, by table.

    A manifest may know of more than its rows; the larger of both counts. `ledgers` (of the APIs, by model) know every
    call of the run's folder, also those that were lost or belong to no table any more. The readers' verdicts are those
    that the manifest of expert_labels counts.
    """
    by_table: dict[str, float] = {}
    # Names in order, each once: a table may have rows already and no manifest yet.
    for name in dict.fromkeys([*manifests, *costs_of_rows]):
        booked = manifests[name].cost if name in manifests else 0.0
        by_table[name] = round(max(costs_of_rows.get(name, 0.0), booked), 6)
    paid_to_apis = sum(ledger.spent + ledger.possibly_paid for ledger in ledgers.values())
    in_tables = sum(by_table.get(name, 0.0) for name in BY_API)
    # A call may be paid for and its answer lost: no row knows of it, the ledger does.
    beyond_tables = round(max(0.0, paid_to_apis - in_tables), 6)
    num_verdicts = 0.0
    if "expert_labels" in manifests:
        num_verdicts = manifests["expert_labels"].figures.get("verdicts", 0)
    readers = round(num_verdicts * dollars_per_verdict, 6)
    ledger_figures = {}
    for model, ledger in ledgers.items():
        ledger_figures[model] = LedgerFigures(
            spent=ledger.spent,
            answers=ledger.answers,
            possibly_paid=ledger.possibly_paid,
            lost_calls=ledger.lost_calls,
        )
    total = sum(by_table.values()) + beyond_tables + readers
    return CostFigures(
        tables={name: cost for name, cost in by_table.items() if cost},
        ledgers=ledger_figures,
        beyond_tables=beyond_tables,
        readers=readers,
        total=round(total, 6),
    )
