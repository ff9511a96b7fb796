"""What APIs and readers were paid for the dataset, US dollars; time on own GPUs is in no table."""

from collections.abc import Mapping
from typing import Any

from medmm_ray.data.tables import Manifest

Row = dict[str, Any]
BY_API = ("solutions", "judge_labels")
"""Tables whose rows may be paid to an API, through the run's ledgers."""


def cost_figures(
    rows: Mapping[str, float],
    manifests: Mapping[str, Manifest],
    ledgers: Mapping[str, Row],
    dollars_per_verdict: float = 0.0,
) -> Row:
    """The cost by table and in all: `rows` are the sums of the rows' own costs, by table.

    A manifest may know of more than its rows; the larger of both counts. `ledgers` (of the APIs, by model) know
    every call of the run's folder, also those that were lost or belong to no table any more: what they have booked
    beyond the tables, possibly paid calls included, is `beyond_tables`. `readers` is what the verdicts cost
    that the manifest of expert_labels counts.
    """
    booked = {name: manifest.cost for name, manifest in manifests.items()}
    names = [*manifests, *(name for name in rows if name not in manifests)]
    spent = {name: round(max(rows.get(name, 0.0), booked.get(name, 0.0)), 6) for name in names}
    calls = sum(ledger["spent"] + ledger["possibly_paid"] for ledger in ledgers.values())
    beyond = round(max(0.0, calls - sum(spent.get(name, 0.0) for name in BY_API)), 6)
    verdicts = manifests["expert_labels"].figures.get("verdicts", 0) if "expert_labels" in manifests else 0
    readers = round(verdicts * dollars_per_verdict, 6)
    kept = ("spent", "answers", "possibly_paid", "lost_calls")
    return {
        "tables": {name: cost for name, cost in spent.items() if cost},
        "ledgers": {name: {key: ledger[key] for key in kept} for name, ledger in ledgers.items()},
        "beyond_tables": beyond,
        "readers": readers,
        "total": round(sum(spent.values()) + beyond + readers, 6),
    }
