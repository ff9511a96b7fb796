"""Who judges, and what the judge sees."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, Splits, execution
from medmm_ray.engines.llm.client import ApiEngine
from medmm_ray.engines.vllm_engine import ActorPool, VllmEngine


class JudgePool(ActorPool):
    """The judge's actors."""

    num_cpus: float = execution(0.5, ge=0)
    """Logical CPUs per actor."""


class PhantomEngine(JudgePool):
    """The source's truth in place of a model."""

    kind: Literal["phantom"] = "phantom"
    """phantom: the source's truth, with errors."""
    error_rate: float = Field(0.08, ge=0, le=0.5)
    """Share of checkable steps whose verdict is flipped."""


class JudgeVllm(VllmEngine, JudgePool):
    """A model in the judge's actors."""

    model: str | None = None
    """Checkpoint that judges, as in models; null takes the run's own policy."""
    num_cpus: float = execution(0.5, ge=0)
    """Logical CPUs per actor."""


class JudgeApi(ApiEngine, JudgePool):
    """A model behind an API that judges."""

    model: str
    """Name of the model."""
    max_images: int = Field(16, ge=0)
    """Most images in a request, the question's first, then the similar cases'."""
    max_prompt_tokens: int = Field(32_768, ge=16)
    """Longest prompt, tokens (estimated); a solution that needs more fails by name."""


JudgeEngine = Annotated[PhantomEngine | JudgeVllm | JudgeApi, Field(discriminator="kind")]


class JudgeConfig(Config):
    """Who judges, what the judge sees, and in which form it answers."""

    engine: JudgeEngine = PhantomEngine()
    """Who judges."""
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
    image_px: int = Field(1024, ge=32, le=1024)
    """Longest side of an image in the prompt, pixels."""
    num_documents: int = Field(8, ge=0)
    """Retrieved documents in the prompt; one that does not fit is left out."""
    num_references: int = Field(3, ge=0)
    """Similar cases in the prompt: diagnosis, and image where the model takes images."""
    solution_reserve: int = Field(1024, ge=0)
    """Tokens of a prompt that documents leave to a solution."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null leaves it to the model (reasoning models take no other)."""
    tries: int = execution(2, ge=1)
    """Times that a reply is asked for, each but the first with the fault of the one before named. An API's replies are
    kept: to ask anew where they did not fit (judge_reply), run again with one more."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer of the judge, tokens."""
    constrain: bool = True
    """Structured output: let the engine, or the API, write only replies of the required form."""
    warm_cache: bool = execution(True)
    """Send the first call of a question ahead of its others: they then find the shared text in the prompt cache."""
    seed: int = 0
    """Start of a phantom judge's errors, and of a vllm judge's sampling."""

    @model_validator(mode="after")
    def _shares_calls_in_json(self) -> "JudgeConfig":
        if self.solutions_per_call > 1 and (self.granularity == "step" or self.reply == "lines"):
            raise ValueError("solutions_per_call > 1 needs granularity=solution and reply=json")
        return self
