"""A recipe: the config of every step, under the step's name. ``jobs/recipes/`` holds the shipped ones."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from jobs.graph import BY_NAME
from medmm_ray.audit import AuditConfig
from medmm_ray.config import Config, execution
from medmm_ray.curate import CurateConfig
from medmm_ray.embed import EmbedConfig
from medmm_ray.engines.index import IndexConfig
from medmm_ray.evaluate import EvaluateConfig
from medmm_ray.ingest import IngestConfig
from medmm_ray.judge import JudgeConfig
from medmm_ray.monte_carlo import MonteCarloConfig
from medmm_ray.retrieve import RetrieveConfig
from medmm_ray.review import ReviewConfig
from medmm_ray.review_page import ReviewPageConfig
from medmm_ray.sample import SampleConfig
from medmm_ray.score import ScoreConfig, StatesConfig
from medmm_ray.serve import ServeConfig
from medmm_ray.train.image_text import ImageTextConfig
from medmm_ray.train.policy import PolicyConfig
from medmm_ray.train.text_prm import TextPrmConfig
from medmm_ray.train.two_tower import TwoTowerConfig
from medmm_ray.tree_search import TreeSearchConfig
from medmm_ray.tree_search.beam import BeamSearchConfig
from medmm_ray.write_questions import WriteQuestionsConfig


class ModelsConfig(Config):
    """Checkpoints to take instead of training one: each given one leaves its training step out.

    A folder, a URI, a hub id, or ``package:<module>`` for weights that an installed package carries.
    """

    image_tower: str | None = None
    """Image tower (open_clip, or a transformers vision model); null: train_image_tower makes it."""
    policy: str | None = None
    """The model that writes solutions; null: train_policy makes it."""
    text_prm: str | None = None
    """Text reward model; null: train_text_prm makes it, from the policy."""
    two_tower: str | None = None
    """Two-tower reward model; null: train_two_tower makes it."""


class PlanConfig(Config):
    """What --dry-run assumes where no config says it; it changes no result."""

    train_questions: int | None = execution(None)
    """Questions of the training split; null: as ingest or curate limits them."""
    test_questions: int | None = execution(None)
    """Questions of the test split; null: likewise."""
    steps: float = execution(8.0)
    """Mean steps of a solution."""
    question_tokens: float = execution(185.0)
    """Mean tokens of a question."""
    solution_tokens: float = execution(350.0)
    """Mean tokens of a solution."""
    document_tokens: float = execution(3072.0)
    """Tokens of documents that the reward model reads with a question."""
    policy_parameters: float = execution(8.03e9)
    """Parameters of the policy."""
    text_parameters: float = execution(8.03e9)
    """Parameters of the text tower."""
    image_parameters: float = execution(86e6)
    """Parameters of the image tower."""
    hidden_size: int = execution(4096)
    """Width of the text tower; it sets the size of the stored states."""
    judged_solutions: int | None = execution(None)
    """Solutions a training question that the judge reads; null: all."""
    judge_parameters: float = execution(0.0)
    """Parameters of a judge on own GPUs; 0: an API."""
    judge_dollars_per_call: float = execution(0.0)
    """US dollars a judge's call, where tokens are not priced."""
    judge_dollars_per_million_read: float = execution(0.0)
    """US dollars per million tokens that the judge reads."""
    judge_dollars_per_million_written: float = execution(0.0)
    """US dollars per million tokens that the judge writes."""
    dollars_per_reviewed_step: float = execution(0.5)
    """US dollars a step that an expert reads."""
    gpu: str = execution("A100-80G")
    """Kind of GPU."""
    num_gpus: int = execution(4)
    """GPUs at work."""
    dollars_per_gpu_hour: float | None = execution(None)
    """US dollars a GPU-hour; null: the table's."""


class RoundsConfig(Config):
    """MedS3's rounds (jobs.meds3)."""

    rounds: int = Field(2, ge=1)
    """Times that a policy learns from its own trees."""
    fine_tuning: PolicyConfig = PolicyConfig()
    """How it learns; its base is the round's policy."""


class Recipe(Config):
    """All settings of a run; every section is the config of the step of that name."""

    run: str = execution("")
    """Output folder or URI; on a cluster one that every node reaches. Required."""
    seed: int = 0
    """Seed of every section that has one and does not set its own."""
    max_error_rate: float = execution(0.01)
    """Share of a table's rows that may fail before its step counts as failed."""
    without: tuple[str, ...] = ("tree_search",)
    """Steps that are left out; the tables that they would make are read as empty."""
    models: ModelsConfig = ModelsConfig()
    """Checkpoints that are there already."""
    ingest: IngestConfig = IngestConfig()
    """Sources to questions, images, documents."""
    write_questions: WriteQuestionsConfig = WriteQuestionsConfig()
    """Questions for images that have none."""
    curate: CurateConfig = CurateConfig()
    """Duplicates, leaks, splits."""
    train_image_tower: ImageTextConfig = ImageTextConfig()
    """Contrastive training of the image tower."""
    embed: EmbedConfig = EmbedConfig()
    """Vectors."""
    index: IndexConfig = IndexConfig()
    """FAISS."""
    retrieve: RetrieveConfig = RetrieveConfig()
    """Evidence."""
    train_policy: PolicyConfig = PolicyConfig()
    """Supervised fine-tuning of the policy."""
    sample: SampleConfig = SampleConfig()
    """Solutions."""
    judge: JudgeConfig = JudgeConfig()
    """Verdicts."""
    monte_carlo: MonteCarloConfig = MonteCarloConfig()
    """Rollouts."""
    tree_search: TreeSearchConfig = TreeSearchConfig()
    """Search trees."""
    review: ReviewConfig = ReviewConfig()
    """The expert's queue."""
    review_page: ReviewPageConfig = ReviewPageConfig()
    """The page where experts read it."""
    audit: AuditConfig = AuditConfig()
    """The dataset report and its gates."""
    train_text_prm: TextPrmConfig = TextPrmConfig()
    """The text reward model."""
    states: StatesConfig = StatesConfig()
    """Text states for training the image part."""
    train_two_tower: TwoTowerConfig = TwoTowerConfig()
    """The image part."""
    score: ScoreConfig = ScoreConfig()
    """Scores of the test split."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The report."""
    serve: ServeConfig = ServeConfig()
    """The Serve application."""
    beam_search: BeamSearchConfig = BeamSearchConfig()
    """Beam search on a finished run (jobs.beam_search)."""
    meds3: RoundsConfig = RoundsConfig()
    """Rounds of tree search and training."""
    plan: PlanConfig = PlanConfig()
    """Assumptions of --dry-run."""

    @field_validator("without")
    @classmethod
    def _known_steps(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in BY_NAME]:
            raise ValueError(f"{unknown[0]!r} is no step; the steps are {', '.join(BY_NAME)}")
        return names

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The recipe's seed in every section that has one and does not set its own."""
        if "seed" not in values:
            return values
        seeded = dict(values)
        for name, info in cls.model_fields.items():
            section = info.annotation
            if isinstance(section, type) and issubclass(section, Config) and "seed" in section.model_fields:
                own = values.get(name) or {}
                seeded[name] = {"seed": values["seed"], **own} if isinstance(own, dict) else own
        return seeded
