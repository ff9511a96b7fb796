"""How large a run is: what its recipe assumes (section ``plan``) and what follows from its other sections."""

from collections.abc import Collection
from dataclasses import dataclass

from medmm_ray.config import Config, execution
from medmm_ray.estimate.hardware import Hardware

PATCHES = 197  # tokens of a ViT-B/16 at 224 pixels, its class token included
BYTES_PER_TOKEN = 4.5  # of English text, about
BF16 = 2  # bytes


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A model on own GPUs, by its parameters, or one behind an API, by its prices in US dollars per million tokens."""

    parameters: float = 0
    """0: the model is behind an API, and its prices count."""
    input_price: float = 0
    output_price: float = 0
    cached_input_price: float | None = None
    """Of prompt tokens that the provider has cached; None: it caches nothing."""
    image_tokens: float = 258
    """Tokens that the model counts for one image."""

    def dollars(self, input_tokens: float, output_tokens: float) -> float:
        """What an API charges for so many tokens, none of them cached."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6

    def gpu_hours(self, hardware: Hardware, input_tokens: float, output_tokens: float) -> float:
        """What own GPUs take for so many tokens."""
        prefill = hardware.prefill_hours(self.parameters, input_tokens)
        return prefill + hardware.decode_hours(self.parameters, output_tokens)


class PlanConfig(Config):
    """What --dry-run assumes where no config says it; it changes no result."""

    train_questions: int | None = execution(None)
    """Questions of the training split; null: as ingest or curate limits them."""
    test_questions: int | None = execution(None)
    """Questions of the test split; null: as ingest or curate limits them."""
    steps: float = execution(8.0)
    """Mean steps of a solution."""
    question_tokens: float = execution(185.0)
    """Mean tokens of a question."""
    solution_tokens: float = execution(350.0)
    """Mean tokens of a solution."""
    document_tokens: float = execution(3072.0)
    """Tokens of documents that a step with num_documents reads with a question."""
    policy_parameters: float = execution(8.03e9)
    """Parameters of the policy."""
    text_parameters: float = execution(8.03e9)
    """Parameters of the text tower."""
    image_parameters: float = execution(86e6)
    """Parameters of the image tower."""
    hidden_size: int = execution(4096)
    """Width of the text tower; it sets the size of the stored states."""
    judge_parameters: float | None = execution(None)
    """Parameters of a judge on own GPUs; null: those of the policy."""
    wrong_share: float = execution(0.5)
    """Share of the solutions whose answer is wrong: a right one costs Monte Carlo mostly nothing."""
    uncertain_share: float = execution(0.1)
    """Share of the judged steps of which the judge is unsure (MedMM)."""
    graded_answers: float = execution(2.0)
    """Distinct answers per question that the model of sample.equivalence grades, in the mean over all questions."""
    written_images: int | None = execution(None)
    """Images for which questions are written; null: as write_questions.max_images limits them."""
    gpu: str = execution("A100-80G")
    """Kind of GPU."""
    num_gpus: int = execution(4)
    """GPUs at work; unset: as many as gpus.count, where that is set."""
    dollars_per_gpu_hour: float | None = execution(None)
    """US dollars per GPU-hour; null: the table's."""


class Sizes(PlanConfig):
    """What a step's cost is computed from beside its own config; a validation split is part of the training questions.

    Shares are between 0 and 1.
    """

    train_questions: int
    """Questions of the training split."""
    test_questions: int
    """Questions of the test split."""
    train_samples: int
    """Solutions per question of the training split."""
    test_samples: int
    """Solutions per question of the test split."""
    images: int
    """Images of all splits, those without a question included."""
    policy: ModelCost = ModelCost(parameters=8.03e9)
    """The policy, on own GPUs or behind an API."""

    @property
    def questions(self) -> int:
        """Questions of all splits."""
        return self.train_questions + self.test_questions

    @property
    def solutions(self) -> int:
        """Solutions of all splits."""
        return self.train_questions * self.train_samples + self.test_questions * self.test_samples

    @property
    def hardware(self) -> Hardware:
        """The GPUs of the run."""
        return Hardware(gpu=self.gpu, num_gpus=self.num_gpus, dollars_per_gpu_hour=self.dollars_per_gpu_hour)

    def prefix_tokens(self, num_documents: int | None) -> float:
        """Tokens of a question, with documents where a step's prompt has some (None: as its checkpoint was trained)."""
        return self.question_tokens + (0 if num_documents == 0 else self.document_tokens)

    def by_split(self, splits: Collection[str]) -> list[tuple[int, int]]:
        """The questions of each split, and the samples of each of its questions."""
        sizes = {
            "train": (self.train_questions, self.train_samples),
            "test": (self.test_questions, self.test_samples),
        }
        return [size for split, size in sizes.items() if split in splits]

    def packed_tokens(self, num_documents: int | None, max_solutions: int | None) -> float:
        """Tokens of the training split with each question's prefix once and at most so many of its solutions."""
        solutions = at_most(self.train_samples, max_solutions)
        return self.train_questions * (self.prefix_tokens(num_documents) + solutions * self.solution_tokens)


def at_most(number: int, limit: int | None) -> int:
    """The number, or the limit where there is a lower one."""
    return number if limit is None else min(number, limit)
