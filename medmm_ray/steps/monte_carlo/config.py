"""Which steps are continued, and how."""

from typing import Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, Splits
from medmm_ray.engines.generator import MAX_SAMPLES, Sampling
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.steps.monte_carlo.search import SEARCHES


class MonteCarloConfig(Config):
    """Which steps are continued, and how."""

    engine: VllmEngine = VllmEngine()
    """The engine that runs the policy."""

    mode: Literal["uncertain", "all", "first_error", "verify"] = "uncertain"
    """uncertain: the steps in which the judge's confidence is low, or two judges differ; all: every step (VisualPRM);
    first_error: a binary search for the first wrong step (OmegaPRM); verify: the two steps around the judge's first
    wrong one."""
    splits: Splits = ("train",)
    """Splits whose solutions are continued."""
    max_solutions: int | None = Field(None, ge=1)
    """Most solutions of a question that are continued, the first by index; null takes all."""
    wrong_only: bool = False
    """Continue only solutions whose answer is wrong."""
    max_share: float = Field(0.1, ge=0, le=1)
    """uncertain: most steps of a question that are continued, as a share of all its steps."""
    num_rollouts: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    """Continuations of each prefix; null: 4 in mode uncertain (MedMM), else 16 (VisualPRM)."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """A prefix is right where num_correct / num_rollouts exceeds this (0 beat all higher ones in VisualPRM)."""
    stop_early: bool = True
    """Stop when a label is decided; false for the label policies soft and advantage, which need the success rate."""
    search_from: Literal["middle", "judge"] = "middle"
    """first_error: where the search begins: in the middle, or at the two steps around the judge's first wrong one."""
    count_solutions: bool = True
    """all, unless wrong_only: count the question's own solutions through a prefix as continuations of it, where
    the two sections sample alike."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    top_k: int = Field(50, ge=0)
    """Tokens to sample from, most likely first; 0 takes all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass to sample from."""
    max_tokens: int = Field(1024, ge=1)
    """Longest continuation, tokens."""
    num_documents: int = Field(0, ge=0)
    """Retrieved documents in the policy's prompt; as in sampling."""
    seed: int = 0
    """Start of all random numbers."""

    @model_validator(mode="after")
    def _searches_with_threshold_zero(self) -> "MonteCarloConfig":
        if self.searches and self.threshold:
            raise ValueError(
                f"mode {self.mode} needs threshold 0, not {self.threshold:g}: that the answer can be reached from a "
                "step says the same of all steps before it, that it is reached often does not; take mode all"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """How continuations are sampled."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens)

    @property
    def rollouts_per_prefix(self) -> int:
        """Continuations of each prefix."""
        return self.num_rollouts or (4 if self.mode == "uncertain" else 16)

    @property
    def searches(self) -> bool:
        """Whether the mode looks for the first wrong step, and labels only what leads to it."""
        return self.mode in SEARCHES

    @property
    def counts_solutions(self) -> bool:
        """Whether the question's own solutions are counted; elsewhere the choice of prefixes would bias the ratio."""
        return self.count_solutions and self.mode == "all" and not self.wrong_only

    @property
    def uses_judge(self) -> bool:
        """Whether the judge's first wrong step says where to look."""
        return self.mode == "verify" or (self.mode == "first_error" and self.search_from == "judge")
