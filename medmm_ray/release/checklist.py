"""The release list: what a release of the MedMM framework has, and how far this one is.

Enters: the run's reports, the datasheet and the licences. Leaves: items with a state each, as Markdown. What a
person has to do is an item too, and stays open: no run can tick it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medmm_ray.release.licences import SourceUse
from medmm_ray.stats.gates import Gate, figure_text, target_text
from medmm_ray.steps.audit import AuditReport
from medmm_ray.steps.evaluate import EvaluationReport

State = Literal["yes", "no", "not measured", "for the author"]
# The framework's plan: its benchmark, its budget and what it wants to reach.
PLANNED_QUESTIONS = {"radiology": 4_000, "pathology": 3_000, "clinical": 3_000}
PLANNED_SAMPLES = 64
PLANNED_REVIEWS = 1_000
PLANNED_DOLLARS = 3_900
PLANNED_ACCURACY = {"medqa": 0.825, "vqa_rad": 0.82, "path_vqa": 0.75, "slake": 0.785}
BY_PEOPLE = (
    "The paper is proofread by all its authors",
    "The code was reviewed by two of the team",
    "The demo was tried by ten people",
)


@dataclass(frozen=True)
class Item:
    """One line of the list."""

    what: str
    state: State
    detail: str = ""


def release_list(
    dataset: AuditReport | None,
    evaluation: EvaluationReport | None,
    sources: Sequence[SourceUse],
    open_questions: Mapping[str, str],
    revision: str,
    phi: str,
) -> list[Item]:
    """The items, in the order of a release's parts; a report is None where that part is not released.

    `phi` is what curation did about identifiers of persons (off, flag, drop).
    """
    items = [
        _licence_item(sources),
        _identifiers_item(sources, phi),
        _datasheet_item(open_questions),
        _revision_item(revision),
    ]
    if dataset is not None:
        items += _dataset_items(dataset)
    if evaluation is not None:
        items += _model_items(evaluation)
    return [*items, *(Item(what, "for the author") for what in BY_PEOPLE)]


def _licence_item(sources: Sequence[SourceUse]) -> Item:
    faulty = [use.terms.name for use in sources if use.terms.faults]
    detail = f"for those alone who may read {', '.join(faulty)}" if faulty else "each source may be passed on"
    return Item("Licences", "no" if faulty else "yes", detail)


def _identifiers_item(sources: Sequence[SourceUse], phi: str) -> Item:
    what = "Identifiers of persons are left out"
    if all(use.terms.made_here for use in sources):
        return Item(what, "yes", "all cases are drawn")
    # Patterns find no bare surname: a person has to look all the same, but not first.
    details = {"drop": "by patterns; look yourself", "flag": "found by patterns, listed, and left in"}
    return Item(what, "yes" if phi == "drop" else "no", details.get(phi, "not looked for: curate.phi=drop"))


def _datasheet_item(open_questions: Mapping[str, str]) -> Item:
    number = len(open_questions)
    return Item("Datasheet", "for the author" if number else "yes", f"{number} questions are open" if number else "")


def _revision_item(revision: str) -> Item:
    # A dirty checkout is code that nobody else has.
    is_known = bool(revision) and not revision.endswith("-dirty")
    return Item("Code is that of a commit", "yes" if is_known else "no", revision or "no checkout")


def _dataset_items(report: AuditReport) -> list[Item]:
    items = []
    for modality, planned in PLANNED_QUESTIONS.items():
        counts = report.coverage.modalities.get(modality)
        number = counts.questions if counts else 0
        items.append(_number_item(f"Questions, {modality}", number, planned))
    sampled = report.sampling.kept / max(report.sampling.questions, 1)
    items.append(_number_item("Solutions a question", sampled, PLANNED_SAMPLES))
    # A neutral verdict was read too.
    reviewed = 0
    for balance in report.balance:
        if balance.source == "expert":
            reviewed = balance.right + balance.wrong + balance.neutral
    items.append(_number_item("Steps read by experts", reviewed, PLANNED_REVIEWS))
    spent = report.cost.total
    detail = f"${spent:,.2f} of APIs and readers, ${PLANNED_DOLLARS:,} planned in all"
    items.append(Item("Budget", "yes" if spent <= PLANNED_DOLLARS else "no", detail))
    return [*items, *map(_gate_item, report.gates)]


def _number_item(what: str, number: float, planned: int) -> Item:
    return Item(what, "yes" if number >= planned else "no", f"{number:,.4g} of {planned:,} planned")


def _gate_item(gate: Gate) -> Item:
    state: State = "not measured"
    if gate.passed is not None:
        state = "yes" if gate.passed else "no"
    return Item(gate.title, state, f"{figure_text(gate.value, gate.unit)}, wanted {target_text(gate)}")


def _model_items(report: EvaluationReport) -> list[Item]:
    items = [_gate_item(gate) for gate in report.gates]
    arm = "multimodal" if "multimodal" in report.arms else next(iter(report.arms), None)
    for name, planned in PLANNED_ACCURACY.items():
        # A plan that was not followed stays in the list.
        group = report.by_dataset.get(name)
        if group is None or arm is None:
            items.append(Item(f"Best of {report.n}, {name}", "not measured", f"wanted {100 * planned:.1f} %"))
            continue
        value = group.best_of_n[arm].value
        state: State = "yes" if value >= planned else "no"
        items.append(Item(f"Best of {report.n}, {name}", state, f"{100 * value:.1f} %, wanted {100 * planned:.1f} %"))
    return items


def markdown(items: Sequence[Item]) -> str:
    """The list as a table."""
    lines = ["| what | | |", "|---|---|---|"]
    for item in items:
        lines.append(f"| {item.what} | {item.state} | {item.detail} |")
    return "\n".join(lines)
