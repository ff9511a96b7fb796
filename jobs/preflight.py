"""Before a run: every API that its recipe asks, and every checkpoint that it names, is looked at.

An API gets one small call a day, each checkpoint's files are listed and its config read, before any GPU hour is spent;
what fails is told all at once. Steps that are complete need nothing any more.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jobs.graph import Step
from jobs.plan import price_notes
from jobs.recipe import asking
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.generator import GeneratorConfig
from medmm_ray.engines.llm.prices import today
from medmm_ray.engines.llm.probe import ApiModel, probe_all
from medmm_ray.reward_model.preflight import CheckpointKind, check_checkpoint

# The steps in which each section asks its model, and what the artifacts are that `models` can name.
ASKED_IN = {
    "write_questions": ("write_questions",),
    "sample": ("sample",),
    "sample.equivalence": ("sample", "monte_carlo", "tree_search"),
    "judge": ("judge",),
    "second_judge": ("judge",),
}
KINDS: dict[str, CheckpointKind] = {
    "policy": "policy",
    "image_tower": "image_tower",
    "text_prm": "reward_model",
    "two_tower": "reward_model",
}


@dataclass
class Findings:
    """What a preflight found: each fault with what to do, and what is to be told though nothing fails."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raise `ConfigError` with all faults, where there are any."""
        if len(self.faults) == 1:
            raise ConfigError(self.faults[0])
        if self.faults:
            listed = "\n".join(f"- {fault}" for fault in self.faults)
            raise ConfigError(f"{len(self.faults)} things that the recipe names cannot be used:\n{listed}")


def preflight(run: Run, steps: Sequence[Step]) -> Findings:
    """Look at what `steps` ask and load, those aside that are complete or left out."""
    due = [step for step in steps if not run.skipped(step) and not run.is_complete(step)]
    findings = Findings()
    for (name, kind), settings in checkpoints_of(run, due).items():
        try:
            check_checkpoint(name, kind)
        except ConfigError as fault:
            findings.faults.append(f"{' and '.join(settings)}: {fault}")
    asked = {name: one for name, one in asking(run.recipe).items() if any(s.name in ASKED_IN[name] for s in due)}
    findings.notes += price_notes(asked)
    _probe(run, asked, findings)
    return findings


def _probe(run: Run, asked: Mapping[str, ApiModel], findings: Findings) -> None:
    """Ask each model once by each way to it."""
    ways: dict[tuple[str, str, str, str], list[str]] = {}
    for section, model in asked.items():
        ways.setdefault((model.backend, model.model, model.address, model.key_variable), []).append(section)
    models: dict[str, ApiModel] = {}
    for sections in ways.values():
        name, model = " and ".join(sections), asked[sections[0]]
        if os.environ.get("RAY_ADDRESS") and model.key_variable not in os.environ:
            findings.notes.append(
                f"{name}: {model.key_variable} is not set here, so {model.model} was not asked; the workers need it"
            )
            continue
        sends_images = any(asked[section].sends_images for section in sections)
        wants_json = any(asked[section].wants_json for section in sections)
        models[name] = replace(model, sends_images=sends_images, wants_json=wants_json)
    outcomes = asyncio.run(probe_all(list(models.values()), f"{run.root}/api", today()))
    for name, outcome in zip(models, outcomes, strict=True):
        if isinstance(outcome, list):
            findings.notes += [f"{name}: {note}" for note in outcome]
        else:
            findings.faults.append(f"{name}: {outcome}")


def checkpoints_of(run: Run, steps: Sequence[Step]) -> dict[tuple[str, CheckpointKind], list[str]]:
    """The checkpoints that steps load, each with the settings that name it; the run's own are none of them."""
    recipe, found = run.recipe, dict[tuple[str, CheckpointKind], list[str]]()

    def add(setting: str, name: str | None, kind: CheckpointKind) -> None:
        if name is not None and setting not in found.setdefault((name, kind), []):
            found[name, kind].append(setting)

    for step in steps:
        for artifact in (name for name in step.reads if name in KINDS):
            if artifact == "policy" and (recipe.sample.backend != "vllm" or step.name == "train_text_prm"):
                continue  # an API's model; or the base of a reward model, below
            add(f"models.{artifact}", run.given(artifact), KINDS[artifact])
        section = run.section(step)
        if isinstance(section, GeneratorConfig):
            add(f"{step.name}.lora", section.lora, "adapter")
        match step.name:
            case "embed":
                add("embed.text_model", recipe.embed.text_model, "text_encoder")
            case "train_policy":
                add("train_policy.base", recipe.train_policy.base, "policy")
            case "train_text_prm" if recipe.train_text_prm.base:
                add("train_text_prm.base", recipe.train_text_prm.base, "reward_model")
            case "train_text_prm" if recipe.sample.backend == "vllm":
                add("models.policy", run.given("policy"), "reward_model")
            case "write_questions" if recipe.write_questions.per_image and recipe.write_questions.backend == "vllm":
                add("write_questions.model", recipe.write_questions.model, "policy")
            case "judge":
                for name, judge in (("judge", recipe.judge), ("second_judge", recipe.second_judge)):
                    if judge and judge.backend == "vllm":
                        own = judge.model is not None
                        add(f"{name}.model" if own else "models.policy", judge.model or run.given("policy"), "policy")
    return found


def require(run: Run, steps: Sequence[Step], tell: Callable[[str], None]) -> None:
    """Tell what a preflight has to tell; raise `ConfigError` with all that cannot be used."""
    findings = preflight(run, steps)
    for note in findings.notes:
        tell(note)
    findings.refuse()
