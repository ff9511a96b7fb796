"""Before a run: every API that its recipe asks, and every checkpoint that it names, is checked.

An API gets one small call a day, each checkpoint's files are listed and its config read, before any GPU hour is spent;
all faults are reported at once. Steps that are complete need nothing any more.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jobs.event_loop import run_coroutine
from jobs.graph import Step
from jobs.plan import price_notes
from jobs.recipe import asking, judges
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.prices import today
from medmm_ray.engines.llm.probe import ApiModel, probe_all
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.judge import JudgeVllm

if TYPE_CHECKING:
    from medmm_ray.reward_model.preflight import CheckpointKind

    Named = tuple[str, str | None, CheckpointKind]  # a setting, the checkpoint that it names, and what it must be

# The steps in which each section asks its model, and what the artifacts are that `models` can name.
API_STEPS = {
    "write_questions": ("write_questions",),
    "sample": ("sample",),
    "sample.equivalence": ("sample", "monte_carlo", "tree_search"),
    "judge": ("judge",),
    "second_judge": ("judge",),
}
KINDS: "dict[str, CheckpointKind]" = {
    "policy": "policy",
    "image_tower": "image_tower",
    "text_prm": "reward_model",
    "two_tower": "reward_model",
}


@dataclass
class PreflightReport:
    """Each fault with what to do, and notes on what does not fail."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raise `ConfigError` with all faults, where there are any."""
        if len(self.faults) == 1:
            raise ConfigError(self.faults[0])
        if self.faults:
            listed = "\n".join(f"- {fault}" for fault in self.faults)
            raise ConfigError(f"{len(self.faults)} things that the recipe names cannot be used:\n{listed}")


def preflight(run: Run, steps: Sequence[Step]) -> PreflightReport:
    """Check what `steps` ask and load, without those that are complete or left out."""
    pending = [step for step in steps if not run.skipped(step) and not run.is_complete(step)]
    report = PreflightReport()
    report.faults += _faults_of(checkpoints_of(run, pending))
    models = _models_asked_in(run, pending)
    report.notes += price_notes(models)
    _probe(run, models, report)
    return report


def _faults_of(checkpoints: "Mapping[tuple[str, CheckpointKind], Sequence[str]]") -> list[str]:
    """What is wrong with checkpoints, by the settings that name each."""
    if not checkpoints:
        return []
    from medmm_ray.reward_model.preflight import check_checkpoint  # loads torch and transformers: seconds

    faults: list[str] = []
    for (name, kind), settings in checkpoints.items():
        try:
            check_checkpoint(name, kind)
        except ConfigError as fault:
            faults.append(f"{' and '.join(settings)}: {fault}")
    return faults


def _models_asked_in(run: Run, steps: Sequence[Step]) -> dict[str, ApiModel]:
    """The models behind APIs that `steps` ask, by the recipe's sections."""
    names = {step.name for step in steps}
    return {section: model for section, model in asking(run.recipe).items() if names & set(API_STEPS[section])}


def _probe(run: Run, models: Mapping[str, ApiModel], report: PreflightReport) -> None:
    """Ask each model once by each kind of API."""
    routes: dict[tuple[str, str], list[str]] = {}
    for section, model in models.items():
        routes.setdefault((model.engine.kind, model.model), []).append(section)
    probes: dict[str, ApiModel] = {}
    for sections in routes.values():
        name, model = " and ".join(sections), models[sections[0]]
        if os.environ.get("RAY_ADDRESS") and model.key_variable not in os.environ:
            report.notes.append(
                f"{name}: {model.key_variable} is not set here, so {model.model} was not asked; the workers need it"
            )
            continue
        # One request tries all that the sections will ask of the model.
        sends_images = any(models[section].sends_images for section in sections)
        wants_json = any(models[section].wants_json for section in sections)
        probes[name] = replace(model, sends_images=sends_images, wants_json=wants_json)
    outcomes = run_coroutine(probe_all(list(probes.values()), run.apis.folder, today()))
    for name, outcome in zip(probes, outcomes, strict=True):
        if isinstance(outcome, list):
            report.notes += [f"{name}: {note}" for note in outcome]
        else:
            report.faults.append(f"{name}: {outcome}")


def checkpoints_of(run: Run, steps: Sequence[Step]) -> "dict[tuple[str, CheckpointKind], list[str]]":
    """The checkpoints that steps load, each with the settings that name it; the run's own are none of them."""
    settings: dict[tuple[str, CheckpointKind], list[str]] = {}
    for step in steps:
        for setting, checkpoint, kind in (*_given_artifacts(run, step), *_checkpoints_of_section(run, step)):
            if checkpoint is None:
                continue
            names = settings.setdefault((checkpoint, kind), [])
            if setting not in names:
                names.append(setting)
    return settings


def _given_artifacts(run: Run, step: Step) -> "Iterator[Named]":
    """Those of `models` that a step reads."""
    for artifact in step.reads:
        if artifact not in KINDS:
            continue
        if artifact == "policy" and (run.recipe.sample.engine.kind != "vllm" or step.name == "train_text_prm"):
            continue  # an API's model; or the base of a reward model, of another kind
        yield f"models.{artifact}", run.given(artifact), KINDS[artifact]


def _checkpoints_of_section(run: Run, step: Step) -> "Iterator[Named]":
    """Those that the step's own section names, and the policy where it stands in for one."""
    recipe, section = run.recipe, run.section(step)
    engine = getattr(section, "engine", None)
    if isinstance(engine, VllmEngine):
        yield f"{step.name}.engine.lora", engine.lora, "adapter"
    match step.name:
        case "embed":
            yield "embed.text_model", recipe.embed.text_model, _encoder(recipe.embed)
            yield "embed.query_model", recipe.embed.query_model, _encoder(recipe.embed)
        case "retrieve":
            yield "retrieve.reranker", recipe.retrieve.reranker, "reranker"
        case "train_policy":
            yield "train_policy.base", recipe.train_policy.base, "policy"
        case "train_text_prm" if recipe.train_text_prm.base:
            yield "train_text_prm.base", recipe.train_text_prm.base, "reward_model"
        case "train_text_prm" if recipe.sample.engine.kind == "vllm":
            yield "models.policy", run.given("policy"), "reward_model"
        case "write_questions" if recipe.write_questions.per_image and isinstance(engine, VllmEngine):
            yield "write_questions.engine.model", recipe.write_questions.engine.model, "policy"
        case "judge":
            for name, judge in judges(recipe).items():
                if isinstance(judge.engine, JudgeVllm):
                    model = judge.engine.model
                    setting = "models.policy" if model is None else f"{name}.engine.model"
                    yield setting, model or run.given("policy"), "policy"


def _encoder(config: EmbedConfig) -> "CheckpointKind":
    """What a text encoder must be: with a pooling that is said, any checkpoint of transformers will do."""
    return "text_encoder" if config.pooling is None else "pooled_encoder"


def require(run: Run, steps: Sequence[Step], print_note: Callable[[str], None]) -> None:
    """Print the notes of a preflight; raise `ConfigError` with all that cannot be used."""
    report = preflight(run, steps)
    for note in report.notes:
        print_note(note)
    report.refuse()
