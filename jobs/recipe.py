"""A recipe: the config of every step, under the step's name. ``jobs/recipes/`` holds the shipped ones."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from jobs.graph import BY_NAME
from jobs.shared_settings import GenerationConfig, LabelsConfig, with_shared_settings
from medmm_ray.config import Config, execution
from medmm_ray.engines.index import IndexConfig
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.probe import ApiModel
from medmm_ray.engines.placement import GpuPlacement
from medmm_ray.estimate import PlanConfig
from medmm_ray.pages.review_page import ReviewPageConfig
from medmm_ray.release.config import ReleaseConfig
from medmm_ray.service.config import ServeConfig
from medmm_ray.steps.audit import AuditConfig
from medmm_ray.steps.curate import CurateConfig
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.evaluate import EvaluateConfig
from medmm_ray.steps.ingest import IngestConfig
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine
from medmm_ray.steps.monte_carlo import MonteCarloConfig
from medmm_ray.steps.retrieve import RetrieveConfig
from medmm_ray.steps.review import ReviewConfig
from medmm_ray.steps.sample import SampleConfig
from medmm_ray.steps.score import ScoreConfig, StatesConfig
from medmm_ray.steps.tree_search import TreeSearchConfig
from medmm_ray.steps.tree_search.beam import BeamSearchConfig
from medmm_ray.steps.write_questions import WriteQuestionsConfig
from medmm_ray.train.image_text import ImageTextConfig
from medmm_ray.train.policy import PolicyConfig
from medmm_ray.train.text_prm import TextPrmConfig
from medmm_ray.train.two_tower import TwoTowerConfig


class ModelsConfig(Config):
    """Checkpoints to take instead of training one: each given one leaves its training step out.

    A folder, a URI, a hub id, or ``package:<module>`` for weights that an installed package carries.
    """

    image_tower: str | None = None
    """Image tower (open_clip, or a transformers vision model); null: train_image_tower makes it."""
    policy: str | None = None
    """The model that writes solutions, by an API's name where sample.engine is one; null: train_policy makes it."""
    text_prm: str | None = None
    """Text reward model; null: train_text_prm makes it, from train_text_prm.base or the policy."""
    two_tower: str | None = None
    """Two-tower reward model; null: train_two_tower makes it."""


def judge_name(config: JudgeConfig) -> str:
    """A judge's name in messages, which no other judge has."""
    engine = config.engine
    return f"phantom, seed {config.seed}" if isinstance(engine, PhantomEngine) else f"{engine.kind} {engine.model}"


class ClusterGpus(GpuPlacement):
    """The GPUs of the cluster: which machines have them, and how many there are."""

    count: int | None = execution(None, ge=1)
    """GPUs that the run takes: pools with GPUs that set no num_actors or num_workers are as large as fits. null: those
    of the machines that are there when a step begins; say it where machines only come when they are asked for."""


class RoundsConfig(Config):
    """MedS3's rounds (jobs.meds3)."""

    rounds: int = Field(2, ge=1)
    """Times that a policy learns from its own trees."""
    fine_tuning: PolicyConfig = PolicyConfig()
    """How the policy of the next round is trained; its base is the round's policy."""


class DriverConfig(Config):
    """The machine that the driver of a submitted run takes (jobs.submit).

    Asking for a CPU keeps it off a head that runs no work, and off machines with GPUs where there are others.
    """

    num_cpus: float = execution(1.0, gt=0)
    """CPUs of the driver, beside those of the steps."""
    memory_gib: float = execution(2.0, ge=0)
    """Memory that the driver may need, GiB; 0: not said."""
    label_selector: dict[str, str] = execution({})
    """Labels of the machine: {ray.io/market-type: on-demand} takes no spot machine, whose end is the driver's."""


class Recipe(Config):
    """All settings of a run; every section is the config of the step of that name."""

    run: str = execution("")
    """Output folder or URI; on a cluster one that every node reaches. Required."""
    seed: int = 0
    """Seed of every section that has one and does not set its own."""
    max_error_rate: float = execution(0.01, ge=0, le=1)
    """Share of a table's rows that may fail before its step counts as failed."""
    without: tuple[str, ...] = ("tree_search",)
    """Steps that are left out; the tables that they would make are read as empty."""
    overlap: bool = execution(True)
    """Whether an API judges the first questions' solutions while the others' are still sampled."""
    models: ModelsConfig = ModelsConfig()
    """Checkpoints that are there already."""
    apis: dict[str, ApiConfig] = execution({})
    """Budget, limits, prices, address and key of each model behind an API, by its name."""
    gpus: ClusterGpus = ClusterGpus()
    """Which machines steps with GPUs take, and how many, in every section that does not say so itself."""
    generation: GenerationConfig = GenerationConfig()
    """How the policy generates, in every step that asks it."""
    labels: LabelsConfig = LabelsConfig()
    """How labels become training targets, in both trainings and the dataset report."""
    ingest: IngestConfig = IngestConfig()
    """Where questions, images and documents come from, and how many are taken."""
    write_questions: WriteQuestionsConfig = WriteQuestionsConfig()
    """Writing questions for images that have none."""
    curate: CurateConfig = CurateConfig()
    """What counts as a duplicate or a leak, and how the splits are made."""
    train_image_tower: ImageTextConfig = ImageTextConfig()
    """Contrastive training of the image tower."""
    embed: EmbedConfig = EmbedConfig()
    """Encoders that turn images, documents and questions into vectors."""
    index: IndexConfig = IndexConfig()
    """The FAISS indexes of images and documents."""
    retrieve: RetrieveConfig = RetrieveConfig()
    """How many documents and similar images each question gets."""
    train_policy: PolicyConfig = PolicyConfig()
    """Supervised fine-tuning of the policy."""
    sample: SampleConfig = SampleConfig()
    """Sampling of solutions from the policy."""
    judge: JudgeConfig = JudgeConfig()
    """Who judges the steps, and what the judge sees."""
    second_judge: JudgeConfig | None = None
    """Another judge of the same solutions, whose labels lie beside the first one's in judge_labels; null: none."""
    monte_carlo: MonteCarloConfig = MonteCarloConfig()
    """Monte Carlo labels by rollouts."""
    tree_search: TreeSearchConfig = TreeSearchConfig()
    """Tree search for solutions and labels."""
    review: ReviewConfig = ReviewConfig()
    """How the steps for expert review are chosen."""
    review_page: ReviewPageConfig = ReviewPageConfig()
    """The web page for expert review."""
    audit: AuditConfig = AuditConfig()
    """Targets of the quality gates in the dataset report."""
    train_text_prm: TextPrmConfig = TextPrmConfig()
    """Training of the text reward model."""
    states: StatesConfig = StatesConfig()
    """Precomputed text states for training the image part."""
    train_two_tower: TwoTowerConfig = TwoTowerConfig()
    """Training of the image part on those states."""
    score: ScoreConfig = ScoreConfig()
    """Scoring of the solutions that are evaluated."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What the report measures."""
    serve: ServeConfig = ServeConfig()
    """The Serve application."""
    release: ReleaseConfig = ReleaseConfig()
    """What of a finished run is released, and to whom (jobs.release)."""
    beam_search: BeamSearchConfig = BeamSearchConfig()
    """Beam search on a finished run (jobs.beam_search)."""
    meds3: RoundsConfig = RoundsConfig()
    """Rounds of tree search and training (jobs.meds3)."""
    driver: DriverConfig = DriverConfig()
    """The machine on which a submitted run has its driver (jobs.submit)."""
    plan: PlanConfig = PlanConfig()
    """Numbers that --dry-run assumes."""

    @field_validator("without")
    @classmethod
    def _known_steps(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in BY_NAME:
                raise ValueError(f"{name!r} is no step; the steps are {', '.join(BY_NAME)}")
        return names

    @model_validator(mode="after")
    def _uses_an_api_for_whole_solutions(self) -> "Recipe":
        if faults := api_policy_faults(self):
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _uses_its_apis(self) -> "Recipe":
        models = {model for _, model in api_engines(self).values()}
        unused, unnamed = sorted(set(self.apis) - models), sorted(models - set(self.apis))
        # A misspelt name: its budget would guard nothing. Where all that are asked have theirs, it is a leftover.
        if unused and unnamed:
            raise ValueError(
                f"apis names {', '.join(unused)}, which no section of the recipe asks, and not {', '.join(unnamed)}, "
                f"which is asked; say what holds for it, as apis.{unnamed[0]}.max_cost_usd=<dollars>"
            )
        return self

    @model_validator(mode="after")
    def _two_judges(self) -> "Recipe":
        if self.second_judge and judge_name(self.judge) == judge_name(self.second_judge):
            raise ValueError(
                f"second_judge is the judge itself ({judge_name(self.judge)}), and would only repeat it: name another "
                "second_judge.engine.model or kind; for two phantoms another second_judge.seed"
            )
        return self

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What several sections share, in each of them that has it and does not set its own: the recipe's seed, and
        the sections of `jobs.shared_settings`."""
        annotations = {name: info.annotation for name, info in cls.model_fields.items()}
        sections = {
            name: annotation
            for name, annotation in annotations.items()
            if isinstance(annotation, type) and issubclass(annotation, Config)
        }
        completed = with_shared_settings(super().completed(values), sections)
        seed = completed.get("seed")
        if not isinstance(seed, int):  # not set, or a fault that is reported once
            return completed
        for name, section_type in sections.items():
            section = completed.get(name) or {}
            if "seed" in section_type.model_fields and isinstance(section, dict):
                completed[name] = {"seed": seed, **section}
        return completed


def api_policy_faults(recipe: Recipe) -> list[str]:
    """What a recipe asks of a policy that is behind an API and can only write whole solutions; each with what to do.

    Such a policy is no checkpoint, so nothing can be trained from it or judge by it, and a chat's answer cannot begin
    inside a step, so that nothing can be rolled out or searched.
    """
    kind, policy = recipe.sample.engine.kind, recipe.models.policy
    if kind == "vllm" or "sample" in recipe.without:
        return []
    if policy is None:
        return [
            f"sample.engine.kind is {kind!r} and models.policy is not set; name the API's model: models.policy=<name>"
        ]
    faults = []
    steps = [name for name in ("monte_carlo", "tree_search") if name not in recipe.without]
    if steps:
        without = ", ".join([*recipe.without, *steps])
        faults.append(
            f"{' and '.join(steps)} would continue solutions from inside a step, which models.policy={policy} behind "
            f"an API (sample.engine.kind={kind}) cannot; leave out what cannot be done: without=[{without}]"
        )
    if "train_text_prm" not in recipe.without and not (recipe.models.text_prm or recipe.train_text_prm.base):
        faults.append(
            f"train_text_prm would start from models.policy={policy}, which is behind an API and no checkpoint; name "
            "one as train_text_prm.base, or a reward model as models.text_prm"
        )
    for name, judge in judges(recipe).items():
        is_policy = isinstance(judge.engine, JudgeVllm) and judge.engine.model is None
        if is_policy and "judge" not in recipe.without:
            faults.append(
                f"{name}.engine is vLLM's and would take models.policy={policy}, which is behind an API and no "
                f"checkpoint; name one as {name}.engine.model"
            )
    return faults


def judges(recipe: Recipe) -> dict[str, JudgeConfig]:
    """The judges of a recipe, by their sections."""
    sections = {"judge": recipe.judge}
    if recipe.second_judge:
        sections["second_judge"] = recipe.second_judge
    return sections


def api_engines(recipe: Recipe) -> dict[str, tuple[ApiEngine, str]]:
    """The engines of a recipe that are models behind APIs, each with the name of its model, by their sections."""
    writer, sampler, grader = recipe.write_questions.engine, recipe.sample.engine, recipe.sample.equivalence.engine
    models: dict[str, tuple[ApiEngine, str]] = {}
    if isinstance(writer, ApiEngine) and writer.model:
        models["write_questions"] = (writer, writer.model)
    if isinstance(sampler, ApiEngine) and recipe.models.policy:
        models["sample"] = (sampler, recipe.models.policy)
    if grader:
        models["sample.equivalence"] = (grader, grader.model)
    for name, judge in judges(recipe).items():
        if isinstance(judge.engine, JudgeApi):
            models[name] = (judge.engine, judge.engine.model)
    return models


def asking(recipe: Recipe) -> dict[str, ApiModel]:
    """The sections of a recipe that ask a model behind an API, each with what its calls are like."""
    models: dict[str, ApiModel] = {}
    for name, (engine, model) in api_engines(recipe).items():
        config = recipe.apis.get(model, ApiConfig())
        match name:
            case "write_questions" if recipe.write_questions.per_image:
                models[name] = ApiModel(engine, model, config, recipe.write_questions.temperature, sends_images=True)
            case "sample":
                sends_images = recipe.sample.engine.num_images > 0
                temperature = recipe.sample.temperature
                models[name] = ApiModel(engine, model, config, temperature, sends_images, wants_json=False)
            case "sample.equivalence":
                models[name] = ApiModel(engine, model, config, recipe.sample.equivalence.temperature)
    for name, judge in judges(recipe).items():
        if isinstance(judge.engine, JudgeApi):
            sends_images, wants_json = judge.engine.max_images > 0, judge.reply == "json" and judge.constrain
            config = recipe.apis.get(judge.engine.model, ApiConfig())
            models[name] = ApiModel(
                judge.engine, judge.engine.model, config, judge.temperature, sends_images, wants_json
            )
    return models
