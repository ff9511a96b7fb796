"""What the dataset cost, US dollars."""

from collections.abc import Mapping
from typing import Any

from medmm_ray.tables import Manifest


def cost_figures(labels: Mapping[str, float], manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """The cost by table and in all. `labels` are the sums of the label rows' own costs, by table.

    A table's manifest may know of more than its rows (calls that failed or were lost): the larger of both counts.
    """
    booked = {name: manifest.cost for name, manifest in manifests.items()}
    names = [*manifests, *(name for name in labels if name not in manifests)]
    spent = {name: round(max(labels.get(name, 0.0), booked.get(name, 0.0)), 6) for name in names}
    return {"tables": {name: cost for name, cost in spent.items() if cost}, "total": round(sum(spent.values()), 6)}
