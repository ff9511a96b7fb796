"""The datasheet of a released dataset, in the seven sections of Gebru et al. (Datasheets for Datasets, 2021).

Enters: what manifests, counts and the dataset report say of the run. Leaves: the sheet. A question that no run can
answer is put to the author, who answers it by its name (`release.answers`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import Manifest
from medmm_ray.release.licences import SourceUse
from medmm_ray.stats.gates import figure_text
from medmm_ray.steps.audit import AuditReport
from medmm_ray.text.folders import strip_folders

Answer = str | None
"""None: a question for the author."""
LABELS = ("judge_labels", "monte_carlo_labels", "expert_labels", "tree_labels")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a released dataset."""

    sources: Sequence[SourceUse]
    excluded: Sequence[SourceUse]
    counts: Mapping[str, int]
    """As `medmm_ray.steps.export.export` counts."""
    manifests: Mapping[str, Manifest]
    """Of the run's complete tables, by name."""
    models: Mapping[str, str]
    """The policy, and what scored, by role."""
    report: AuditReport | None
    license: str
    """Of what the run itself made; empty where its author has not chosen one."""
    private: bool
    push: str


@dataclass(frozen=True)
class Question:
    """A question of the sheet: its name, its words, and how the run answers it, if it does."""

    name: str
    words: str
    answer: Callable[[Facts], Answer]


def _author(_: Facts) -> Answer:
    """What the author alone can say."""
    return None


# Answers from what the run keeps


def _instances(facts: Facts) -> Answer:
    pictures = facts.counts.get("images copied", 0)
    return (
        f"{facts.counts['questions']:,} questions with {pictures:,} pictures, {facts.counts['solutions']:,} sampled "
        f"solutions of {facts.counts['steps']:,} steps, and the labels of these steps. The counts above have them by "
        "split and label source."
    )


def _selection(facts: Facts) -> Answer:
    parts = []
    raw = facts.manifests.get("raw_questions")
    questions = facts.manifests["questions"]
    if raw:
        parts.append(f"{raw.rows:,} questions were read, {questions.rows:,} of them kept by curation.")
        for source in raw.config["sources"]:
            limits = []
            for split in ("train", "test"):
                if source[f"num_{split}"] is not None:
                    limits.append(f"at most {source[f'num_{split}']:,} of {split}")
            if limits:
                parts.append(f"Of {source['name']} {' and '.join(limits)} were taken.")
    for use in facts.excluded:
        parts.append(f"{use.terms.name} stayed behind: {use.rows}.")
    return " ".join(parts) or None


def _contents(_: Facts) -> Answer:
    return (
        "The question with its options and answer, its pictures, the documents and reference pictures that were "
        "retrieved for it, and its solutions: text, steps, answer, whether that is right, every label row and every "
        "score. The columns stand in this card's metadata."
    )


def _labels(facts: Facts) -> Answer:
    parts = []
    for name in LABELS:
        manifest = facts.manifests.get(name)
        if manifest is None:
            continue
        failed = sum(manifest.errors.values())
        parts.append(f"`{name}`: {manifest.rows:,} rows, {failed:,} of them failed")
    return f"Yes, side by side by source: {'; '.join(parts)}." if parts else "No step is labelled."


def _missing(facts: Facts) -> Answer:
    parts = []
    for name, manifest in facts.manifests.items():
        for kind, number in sorted(manifest.errors.items()):
            parts.append(f"{name}: {kind} {number:,}")
    if not parts:
        return "No row of the run's tables has an error."
    return f"Rows with an error have none of what their step makes, and say why: {'; '.join(parts)}."


def _relations(_: Facts) -> Answer:
    return (
        "`group` names what questions share (a patient, a study, a picture); `images` and evidence name pictures by id."
    )


def _splits(facts: Facts) -> Answer:
    sizes = []
    for name, number in sorted(facts.counts.items()):
        prefix, _, split = name.partition("questions ")
        if not prefix and split:
            sizes.append(f"{split} {number:,}")
    return f"{', '.join(sizes)} questions. Groups stay whole; test sets of benchmarks are as published."


def _noise(facts: Facts) -> Answer:
    if facts.report is None:
        return None
    parts = ["Labels are made by models unless their source says `expert`."]
    agreement = facts.report.judge_expert
    if agreement is not None:
        kappa = agreement.overall_kappa
        parts.append(f"Judge and expert agree with κ {figure_text(kappa.value, 'kappa')} on {kappa.count:,} steps.")
    figures = _nonzero(facts.manifests["questions"].figures, "images_near_duplicate", "questions_leaked")
    parts.append(f"Curation removed: {figures}." if figures else "Curation found no near duplicate and no leak.")
    return " ".join(parts)


def _external(facts: Facts) -> Answer:
    return "No: pictures and texts lie in the dataset." if facts.counts.get("images copied") else "It has no pictures."


def _sensitive(facts: Facts) -> Answer:
    if all(use.terms.made_here for use in facts.sources):
        return "No: all cases are drawn, and speak of no person."
    return None


def _acquired(facts: Facts) -> Answer:
    parts = []
    for use in facts.sources:
        terms = use.terms
        how = "made by the run" if terms.made_here else terms.get or "brought by the author"
        parts.append(f"- {terms.title}: {use.rows}; {how}")
    models = [f"{role}: {name}" for role, name in facts.models.items()]
    return "\n".join(["Questions, pictures and texts come from", *parts, "", f"Models: {'; '.join(models)}."])


def _mechanism(facts: Facts) -> Answer:
    solutions = facts.manifests["solutions"]
    versions = ", ".join(f"{name} {version}" for name, version in solutions.versions.items())
    settings = strip_folders({name: solutions.config[name] for name in ("temperature", "top_k", "top_p", "seed")})
    sampling = ", ".join(f"{name} {value}" for name, value in settings.items())
    revision = solutions.revision or "an unknown revision"
    return f"medmm_ray at {revision} ({versions}). Solutions were sampled with {sampling}."


def _strategy(facts: Facts) -> Answer:
    quotas = facts.manifests["questions"].config["quotas"]
    parts = [f"Questions fill quotas by split, modality and difficulty: {quotas}." if quotas else "No quotas were set."]
    if "review_queue" in facts.manifests:
        rows = facts.manifests["review_queue"].rows
        parts.append(f"{rows:,} steps for experts were drawn by strata, each with its inclusion probability.")
    return " ".join(parts)


def _timeframe(facts: Facts) -> Answer:
    # The day alone: of the hour nobody needs to know.
    days = sorted(manifest.created[:10] for manifest in facts.manifests.values())
    return f"The tables were made from {days[0]} to {days[-1]}; when the sources' cases are from, their publishers say."


def _preprocessing(facts: Facts) -> Answer:
    config = facts.manifests["questions"].config
    sample = facts.manifests["solutions"].config
    settings = (
        *("near_duplicates", "altered_pictures", "text_similarity", "benchmark_guard", "leakage", "official_test"),
        "phi",
    )
    # A setting that came later is not in every manifest.
    curation = ", ".join(f"{name} {config[name]}" for name in settings if name in config)
    rejected = _nonzero(facts.manifests["solutions"].figures, "rejected")
    return (
        f"Curation ({curation}), retrieval of evidence, and a filter of samples: {sample['min_steps']} to "
        f"{sample['max_steps']} numbered steps with an answer ({rejected or 'none rejected'})."
    )


def _raw(_: Facts) -> Answer:
    return "Yes, in the run (tables raw_questions and raw_images), which is no part of this release."


def _software(_: Facts) -> Answer:
    return "medmm_ray, Apache-2.0; the fingerprints and settings above repeat it."


def _used(facts: Facts) -> Answer:
    return f"Its training split trained {facts.models['scorer']}; its test split measured it."


def _other_uses(_: Facts) -> Answer:
    return "Training and measuring process reward models, judges and graders; studying how label sources differ."


def _impact(_: Facts) -> Answer:
    return (
        "Labels repeat the errors of the models that made them, and are no ground truth. Questions of one group are "
        "not independent: resample groups, not questions."
    )


def _never(_: Facts) -> Answer:
    return "To decide about a patient: neither texts, labels nor scores are medical advice. To train on its test split."


def _distribution(facts: Facts) -> Answer:
    if not facts.push:
        return None
    to_whom = "those whom its owners let in" if facts.private else "everybody"
    return f"On the Hugging Face hub as {facts.push}, to {to_whom}."


def _licence(facts: Facts) -> Answer:
    lines = ["Each question stands under the terms of what it comes from (column `dataset`):", ""]
    lines.append("| source | licence | access | what rests on it |\n|---|---|---|---|")
    for use in facts.sources:
        terms = use.terms
        lines.append(f"| {terms.name} | {terms.licence or 'unknown'} | {terms.access} | {use.rows} |")
    return "\n".join(lines)


def _own_licence(facts: Facts) -> Answer:
    return f"`{facts.license}`." if facts.license else None


def _restrictions(facts: Facts) -> Answer:
    parts = []
    for use in (*facts.sources, *facts.excluded):
        if use.terms.faults:
            state = "stayed behind" if use in facts.excluded else "is in it"
            parts.append(f"{use.terms.name} {state}: {', '.join(use.terms.faults)}")
    return f"{'; '.join(parts)}." if parts else "None that the sources' declarations name."


def _older(_: Facts) -> Answer:
    return "A release is made whole from a run; the hub keeps the commits of earlier ones."


def _nonzero(figures: Mapping[str, float], *prefixes: str) -> str:
    """Counts of a manifest that are above zero, in words."""
    parts = []
    for name, value in figures.items():
        if value and name.startswith(prefixes):
            parts.append(f"{name} {value:,.0f}")
    return ", ".join(parts)


# The sheet

SHEET: Mapping[str, Sequence[Question]] = {
    "Motivation": (
        Question("purpose", "For what purpose was the dataset created?", _author),
        Question("creators", "Who created it, and on behalf of whom?", _author),
        Question("funding", "Who funded it?", _author),
    ),
    "Composition": (
        Question("instances", "What do the instances represent, and how many are there?", _instances),
        Question("selection", "Does it contain all possible instances, or a sample?", _selection),
        Question("contents", "What data does each instance consist of?", _contents),
        Question("labels", "Is there a label or target for each instance?", _labels),
        Question("missing", "Is any information missing from individual instances?", _missing),
        Question("relations", "Are relationships between instances made explicit?", _relations),
        Question("splits", "Are there recommended splits?", _splits),
        Question("noise", "Are there errors, sources of noise, or redundancies?", _noise),
        Question("external", "Does it rely on external resources?", _external),
        Question("confidential", "Does it contain confidential or offensive data?", _sensitive),
        Question("people", "Can people be identified, and which groups of people does it show?", _sensitive),
    ),
    "Collection process": (
        Question("acquired", "How was the data acquired?", _acquired),
        Question("mechanism", "What mechanisms were used to collect it?", _mechanism),
        Question("strategy", "What was the sampling strategy?", _strategy),
        Question("collectors", "Who was involved in the collection and the review, and how were they paid?", _author),
        Question("timeframe", "Over what time was it collected?", _timeframe),
        Question("ethics", "Was it reviewed by an ethics board?", _author),
        Question("consent", "Were the people whom it shows told, and did they consent?", _sensitive),
    ),
    "Preprocessing, cleaning, labelling": (
        Question("preprocessing", "What preprocessing, cleaning and labelling was done?", _preprocessing),
        Question("raw", "Was the raw data saved?", _raw),
        Question("software", "Is the software available?", _software),
    ),
    "Uses": (
        Question("used", "What has it been used for already?", _used),
        Question("other_uses", "What else could it be used for?", _other_uses),
        Question("impact", "What may impact future uses?", _impact),
        Question(
            "vendors", "What do the vendors of the models that wrote and labelled it allow it to be used for?", _author
        ),
        Question("never", "For what should it not be used?", _never),
    ),
    "Distribution": (
        Question("distribution", "How and to whom is it distributed?", _distribution),
        Question("licence", "Under what licence is what it was made from?", _licence),
        Question("own_licence", "Under what licence are its solutions and labels?", _own_licence),
        Question("restrictions", "Have third parties imposed restrictions on it?", _restrictions),
        Question("export_controls", "Do export controls or other regulations apply?", _author),
    ),
    "Maintenance": (
        Question("maintainers", "Who maintains it, and how are they reached?", _author),
        Question("updates", "Will it be updated, and where are errors told?", _author),
        Question("retention", "Are there limits on how long data about people is kept?", _sensitive),
        Question("older", "Will older versions stay?", _older),
        Question("contributions", "Can others extend it?", _author),
    ),
}


@dataclass(frozen=True)
class Sheet:
    """A datasheet as Markdown, and the questions that it puts to the author, by name."""

    text: str
    open_questions: Mapping[str, str]


def datasheet(facts: Facts, answers: Mapping[str, str]) -> Sheet:
    """The sheet; what the author answers stands in place of what the run would say."""
    names = [question.name for questions in SHEET.values() for question in questions]
    for name in answers:
        if name not in names:
            raise ConfigError(f"release.answers names {name!r}; the datasheet asks {', '.join(names)}")
    lines = ["## Datasheet", ""]
    open_questions: dict[str, str] = {}
    for section, questions in SHEET.items():
        lines += [f"### {section}", ""]
        for question in questions:
            # Who made the data knows better than its manifests.
            answer = answers.get(question.name) or question.answer(facts)
            if answer is None:
                open_questions[question.name] = question.words
                answer = f"*A question for the author (`release.answers.{question.name}`).*"
            lines += [f"**{question.words}** {answer}", ""]
    return Sheet("\n".join(lines).rstrip() + "\n", open_questions)
