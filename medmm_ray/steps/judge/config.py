"""Who judges, and what the judge sees."""

from typing import Literal

from pydantic import Field, model_validator

from medmm_ray.config import Splits, execution
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.vllm_engine import GeneratorConfig


class JudgeConfig(GeneratorConfig, ApiConfig):
    """Who judges, what the judge sees, in which form it answers; then the engine (vllm) and the API."""

    backend: Literal["phantom", "vllm", "gemini", "openai"] = "phantom"
    """phantom: the source's truth with errors; vllm: a model in the actor; gemini, openai: an API of that kind."""
    model: str | None = None
    """gemini, openai: the model's name. vllm: a checkpoint as in models, null takes the run's own policy."""
    splits: Splits = ("train", "validation", "test")
    """Splits whose solutions are judged."""
    max_solutions: int | None = Field(None, ge=1)
    """Most solutions of a question that are judged, the first with different steps; null: all."""
    granularity: Literal["solution", "step"] = "solution"
    """solution: all steps in one call; step: a call for each step, which sees the steps before it."""
    solutions_per_call: int = Field(1, ge=1, le=16)
    """Solutions of a question that share one call (granularity solution): fewer where they do not fit, each alone where
    their replies do not."""
    reply: Literal["json", "lines"] = "json"
    """json: the three tests, verdict, confidence and reason of each step; lines: verdict and confidence alone."""
    show_answer: bool = False
    """Show the judge the right answer; each label then says so (saw_answer)."""
    max_images: int = Field(16, ge=0)
    """Most images in a request to an API, the question's first, then the similar cases' (vllm: num_images)."""
    image_px: int = Field(1024, ge=32, le=1024)
    """Longest side of an image in the prompt, pixels."""
    num_documents: int = Field(8, ge=0)
    """Retrieved documents in the prompt; one that does not fit is left out."""
    num_references: int = Field(3, ge=0)
    """Similar cases in the prompt: diagnosis, and image where the model takes images."""
    solution_reserve: int = Field(1024, ge=0)
    """Tokens of a prompt that documents leave to a solution."""
    max_prompt_tokens: int = Field(32_768, ge=16)
    """Longest prompt for an API, tokens (estimated); a solution that needs more fails by name."""
    tries: int = execution(2, ge=1)
    """Times that a reply is asked for, each but the first with the fault of the one before named. An API's replies are
    kept: to ask anew where they did not fit (judge_reply), run again with one more."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer of the judge, tokens."""
    constrain: bool = True
    """Structured output: let the engine, or the API, write only replies of the required form."""
    warm_cache: bool = execution(True)
    """Send the first call of a question ahead of its others: they then find the shared text in the prompt cache."""
    error_rate: float = Field(0.08, ge=0, le=0.5)
    """phantom: share of checkable steps whose verdict is flipped."""
    seed: int = 0
    """Start of the phantom judge's errors, and of a vllm judge's sampling."""
    num_cpus: float = execution(0.5)
    """Logical CPUs per actor."""

    @model_validator(mode="after")
    def _shares_calls_in_json(self) -> "JudgeConfig":
        if self.solutions_per_call > 1 and (self.granularity == "step" or self.reply == "lines"):
            raise ValueError("solutions_per_call > 1 needs granularity=solution and reply=json")
        return self

    @model_validator(mode="after")
    def _has_a_model(self) -> "JudgeConfig":
        if self.backend not in ("phantom", "vllm") and not self.model:
            raise ValueError(f"judge.backend is {self.backend!r} and judge.model is not set; name the model")
        return self
