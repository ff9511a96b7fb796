"""What APIs and readers were paid for the dataset, US dollars; time on own GPUs is in no table."""

from collections.abc import Mapping

from medmm_ray.config import JsonObject
from medmm_ray.data.tables import Manifest

BY_API = ("solutions", "judge_labels")
"""Tables whose rows may be paid to an API, through the run's ledgers."""
LEDGER_FIGURES = ("spent", "answers", "possibly_paid", "lost_calls")


def cost_figures(
    costs_of_rows: Mapping[str, float],
    manifests: Mapping[str, Manifest],
    ledgers: Mapping[str, JsonObject],
    dollars_per_verdict: float = 0.0,
) -> JsonObject:
    """The cost by table and in all, US dollars: `costs_of_rows` are the sums of the rows' own costs, by table.

    A manifest may know of more than its rows; the larger of both counts. `ledgers` (of the APIs, by model) know every
    call of the run's folder, also those that were lost or belong to no table any more: what they
    have booked beyond the tables, possibly paid calls included, is `beyond_tables`. `readers` is what the verdicts cost
    that the manifest of expert_labels counts.
    """
    by_table: dict[str, float] = {}
    # Names in order, each once: a table may have rows already and no manifest yet.
    for name in dict.fromkeys([*manifests, *costs_of_rows]):
        booked = manifests[name].cost if name in manifests else 0.0
        by_table[name] = round(max(costs_of_rows.get(name, 0.0), booked), 6)
    paid_to_apis = sum(ledger["spent"] + ledger["possibly_paid"] for ledger in ledgers.values())
    in_tables = sum(by_table.get(name, 0.0) for name in BY_API)
    # A call may be paid for and its answer lost: no row knows of it, the ledger does.
    beyond_tables = round(max(0.0, paid_to_apis - in_tables), 6)
    num_verdicts = 0.0
    if "expert_labels" in manifests:
        num_verdicts = manifests["expert_labels"].figures.get("verdicts", 0)
    readers = round(num_verdicts * dollars_per_verdict, 6)
    ledger_figures = {}
    for model, ledger in ledgers.items():
        ledger_figures[model] = {key: ledger[key] for key in LEDGER_FIGURES}
    total = sum(by_table.values()) + beyond_tables + readers
    return {
        "tables": {name: cost for name, cost in by_table.items() if cost},
        "ledgers": ledger_figures,
        "beyond_tables": beyond_tables,
        "readers": readers,
        "total": round(total, 6),
    }
