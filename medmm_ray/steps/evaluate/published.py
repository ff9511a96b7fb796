"""Published figures to stand beside a run's own: tables of papers and leaderboards, as their authors report them.

A table names its data sets as `python -m jobs.datasets` does. Shares are in [0, 1]. Comparisons are only as good as the
settings are alike: each system says how many samples it had and how its answer was chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Metric = Literal["accuracy", "macro_f1", "processbench_f1", "prm_score"]


@dataclass(frozen=True, kw_only=True)
class PublishedSystem:
    """One row of a published table: the figure by data set; `decoder` chose one answer of `num_samples`."""

    name: str
    figures: Mapping[str, float]
    decoder: Literal["one_sample", "majority", "best_of_n", "sc_rm", ""] = ""
    num_samples: int = 1


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A paper's table: its data sets in order, what is measured, and its systems."""

    title: str
    source: str
    data_sets: Sequence[str]
    systems: Sequence[PublishedSystem] = ()
    metric: Metric = "accuracy"


_MED_PRM_SETS = ("medqa", "medqa_5", "medmcqa", "mmlu", "ddxplus", "agentclinic_nejm", "agentclinic_osce")
_MIRAGE_SETS = ("mmlu", "medqa", "medmcqa", "pubmedqa", "bioasq")


def _in_percent(data_sets: Sequence[str], *percents: float) -> dict[str, float]:
    """A row of a table whose figures are percents."""
    return {name: percent / 100 for name, percent in zip(data_sets, percents, strict=True)}


TABLES: Mapping[str, PublishedTable] = {
    # The table at N = 64; its own means over the seven sets: 64.76, 70.03, 72.39, 72.67.
    "med_prm": PublishedTable(
        title="Med-PRM, Llama-3.1-8B-Instruct",
        source="arXiv 2506.11474",
        data_sets=_MED_PRM_SETS,
        systems=(
            PublishedSystem(
                name="one chain of thought",
                decoder="one_sample",
                figures=_in_percent(_MED_PRM_SETS, 70.93, 65.20, 61.60, 78.97, 68.80, 35.83, 71.96),
            ),
            PublishedSystem(
                name="self-consistency",
                decoder="majority",
                num_samples=64,
                figures=_in_percent(_MED_PRM_SETS, 74.86, 70.70, 63.40, 81.63, 75.20, 49.17, 75.23),
            ),
            PublishedSystem(
                name="Med-PRM, best of N",
                decoder="best_of_n",
                num_samples=64,
                figures=_in_percent(_MED_PRM_SETS, 76.98, 73.06, 63.40, 81.18, 78.00, 57.50, 76.64),
            ),
            PublishedSystem(
                name="Med-PRM, SC+RM",
                decoder="sc_rm",
                num_samples=64,
                figures=_in_percent(_MED_PRM_SETS, 78.24, 73.53, 66.40, 83.29, 76.80, 53.33, 77.10),
            ),
        ),
    ),
    # PubMedQA without its abstracts. Means over the five sets: 60.69 and 71.57.
    "mirage": PublishedTable(
        title="MIRAGE, gpt-3.5-turbo-16k",
        source="the MIRAGE leaderboard; it guesses where it reads no answer",
        data_sets=_MIRAGE_SETS,
        systems=(
            PublishedSystem(
                name="chain of thought",
                decoder="one_sample",
                figures=_in_percent(_MIRAGE_SETS, 72.91, 65.04, 55.25, 36.00, 74.27),
            ),
            PublishedSystem(
                name="chain of thought, 32 documents",
                decoder="one_sample",
                figures=_in_percent(_MIRAGE_SETS, 75.48, 66.61, 58.04, 67.40, 90.29),
            ),
        ),
    ),
    # The sets alone: its figures stand in several versions of the paper, of different models.
    "meds3": PublishedTable(
        title="MedS3's eleven sets",
        source="arXiv 2501.12051",
        data_sets=(
            *("medqa", "medmcqa", "pubmedqa", "bioasq", "mmlu", "healthfact"),
            *("ddxplus", "pubhealth", "drugdose", "seer", "biomrc"),
        ),
    ),
    # What the plan wants to reach; nobody has measured it.
    "medical_vqa": PublishedTable(
        title="Medical visual questions",
        source="the MedMM plan: targets, not results",
        data_sets=("vqa_rad", "path_vqa", "slake"),
        systems=(
            PublishedSystem(name="target of the plan", figures={"vqa_rad": 0.82, "path_vqa": 0.75, "slake": 0.785}),
        ),
    ),
    # Benchmarks of reward models bring their solutions: no policy takes part.
    "visualprocessbench": PublishedTable(
        title="VisualProcessBench, macro-F1 over pooled steps",
        source="arXiv 2503.10291",
        data_sets=("visualprocessbench",),
        metric="macro_f1",
        systems=(
            PublishedSystem(name="VisualPRM-8B", figures={"visualprocessbench": 0.62}),
            PublishedSystem(name="GPT-4o", figures={"visualprocessbench": 0.603}),
            PublishedSystem(name="chance", figures={"visualprocessbench": 0.5}),
        ),
    ),
    "processbench": PublishedTable(
        title="ProcessBench, F1 of first errors",
        source="arXiv 2412.06559",
        data_sets=("processbench",),
        metric="processbench_f1",
    ),
    "prmbench": PublishedTable(
        title="PRMBench, PRMScore",
        source="arXiv 2501.03124",
        data_sets=("prmbench",),
        metric="prm_score",
    ),
}
