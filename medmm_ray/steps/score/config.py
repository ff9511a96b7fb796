"""Settings of the steps `score` and `states`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from medmm_ray.config import Splits, execution
from medmm_ray.engines.images import MAX_PIXELS
from medmm_ray.engines.vllm_engine import EngineConfig

Arm = Literal["multimodal", "text_only", "shuffled_image", "no_documents"]
ImageSource = Literal["own", "shuffled"]
IMAGES_OF_ARM: dict[Arm, ImageSource | None] = {
    "multimodal": "own",
    "text_only": None,
    "shuffled_image": "shuffled",
    "no_documents": "own",
}
# Arms that would say nothing of a model that has no image input.
IMAGE_ARMS: tuple[Arm, ...] = ("multimodal", "shuffled_image")


class ScoringConfig(EngineConfig):
    """How solutions are scored, and what runs the text tower. The settings of `EngineConfig` are vLLM's."""

    engine: Literal["torch", "vllm"] = "torch"
    """What runs the text tower. vllm gives what torch does to rounding (1e-5 in float32), with tensor parallelism and
    quantised weights; the last bits also depend on what it computes together, so the engine is part of what identifies
    a table. It reads no images itself. Its further arguments go into `vllm`, max_model_len (default: the checkpoint's
    context) among them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the text tower."""
    num_documents: int | None = Field(default=None, ge=0)
    """Retrieved documents that are offered, best first; those within the length are read. null: as many as the
    checkpoint was trained on, 32 where it does not say."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of documents, question and solution together by which documents are chosen; null: the checkpoint's own."""
    reserve: int | None = Field(default=None, ge=0)
    """Tokens of max_length that documents leave free; null: the checkpoint's own (Med-PRM: 1024)."""
    token_budget: int | None = execution(None, ge=1)
    """Most tokens in one forward pass; bounds memory, changes no score. null: 1024 on a CPU, 4096 on a GPU."""
    pack_questions: bool = False
    """Let short questions share a forward pass. Faster, but the last bits of a score then depend on its neighbours: an
    interrupted run equals an undisturbed one to 1e-5, not bit by bit."""
    batch_size: int = execution(8, ge=1)
    """Questions that an actor takes at a time."""
    num_actors: int = execution(1, ge=1)
    """Most copies of the model at work; unset, with GPUs: as the recipe's `gpus` says."""
    num_cpus: float = execution(1.0, ge=0)
    """CPUs per copy."""
    num_gpus: float = execution(0.0, ge=0)
    """GPUs per copy; above 0 the model runs there."""

    @model_validator(mode="after")
    def _engine(self) -> Self:
        # For another engine they would be ignored without a word.
        settings_of_vllm = {
            "vllm": bool(self.vllm),
            "batch_invariant": self.batch_invariant,
            "tensor_parallel_size": self.tensor_parallel_size > 1,
        }
        for name, is_set in settings_of_vllm.items():
            if self.engine == "torch" and is_set:
                raise ValueError(f"{name}={getattr(self, name)!r} is a setting of engine=vllm, and engine is 'torch'")
        return self


class StatesConfig(ScoringConfig):
    """How text states are computed, and of which solutions; they are kept in `dtype`, twice the text tower's width a
    step."""

    max_solutions: int | None = Field(default=None, ge=1)
    """Solutions of a question whose states are computed and stored; null: all. At 8B in bfloat16 a step has 16 KB: all
    64 solutions of 10,000 questions 84 GB, sixteen of them 21."""
    choose: Literal["first", "balanced"] = "first"
    """Which ones, where there are more. first: the first; balanced: as many whose answer is right as others, the first
    of each, and where one kind has too few, more of the other."""


class ScoreConfig(ScoringConfig):
    """Which arms are scored, and with what images."""

    arms: tuple[Arm, ...] = ("multimodal", "text_only", "shuffled_image")
    """multimodal: everything; text_only: no image; shuffled_image: another question's images; no_documents: without."""
    splits: Splits = ("test",)
    """Splits whose solutions are scored; with validation among them the report fits a temperature on it."""
    num_references: int | None = Field(default=None, ge=0)
    """Similar images that the image tower is given beside a question's own. null: as many as the checkpoint was
    trained on, 3 where it does not say, 0 for a vision-language model."""
    max_pixels: int = MAX_PIXELS
    """Largest image that is opened, width x height in pixels; a larger one is an error of its question."""
    seed: int = 0
    """Seed of the shuffle of images."""
