"""The numbers that decide what a run costs, in a group a step. Shares are between 0 and 1, prices in US dollars."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from medmm_ray.estimate.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A model on own GPUs, by its parameters, or one behind an API, by its prices per million tokens."""

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


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Questions, samples and their lengths; a validation split is part of the training questions."""

    train_questions: int
    test_questions: int
    train_samples: int
    test_samples: int
    images: int
    reference_images: int = 3
    """Retrieved images per question, which the image part is given."""
    steps: float = 8
    """Mean steps per solution."""
    question_tokens: float = 185
    solution_tokens: float = 350
    document_tokens: float = 3072
    with_documents: Collection[str] = ("tree_search", "sample", "judge", "train_text_prm", "states", "score")
    """Steps whose prompts have the documents."""
    wrong_share: float = 0.5
    """Share of the solutions whose answer is wrong."""
    oversampling: float = 1.25
    """Samples drawn for each one in the table (Med-PRM's, for its filter of 3 to 9 steps)."""

    @property
    def questions(self) -> int:
        """Questions of all splits."""
        return self.train_questions + self.test_questions

    @property
    def solutions(self) -> int:
        """Solutions of all splits."""
        return self.train_questions * self.train_samples + self.test_questions * self.test_samples

    def prefix_tokens(self, step: str) -> float:
        """Tokens of a question with the documents that a step's prompt has."""
        return self.question_tokens + (self.document_tokens if step in self.with_documents else 0)

    def by_split(self, splits: Collection[str]) -> list[tuple[int, int]]:
        """The questions of each split, and the samples of each of its questions."""
        sizes = {
            "train": (self.train_questions, self.train_samples),
            "test": (self.test_questions, self.test_samples),
        }
        return [size for split, size in sizes.items() if split in splits]

    def packed_tokens(self, step: str, max_solutions: int | None = None) -> float:
        """Tokens of the training split with each question's prefix once and at most so many of its solutions."""
        solutions = at_most(self.train_samples, max_solutions)
        return self.train_questions * (self.prefix_tokens(step) + solutions * self.solution_tokens)


def at_most(number: int, limit: int | None) -> int:
    """The number, or the limit where there is a lower one."""
    return number if limit is None else min(number, limit)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Models that are trained, and how long; 0 epochs where a model is given."""

    text_parameters: float = 8.03e9
    image_parameters: float = 86e6
    fusion_parameters: float = 30e6
    hidden_size: int = 4096
    """Width of the text tower; it sets the size of the stored states."""
    policy_epochs: float = 0
    text_epochs: float = 0
    text_solutions: int | None = None
    """Most solutions of a question that the text tower is trained on."""
    fusion_epochs: float = 5


@dataclass(frozen=True, kw_only=True)
class QuestionWriting:
    """Questions that a model writes for images without one."""

    model: ModelCost = ModelCost()
    images: int = 0
    questions_per_image: int = 1
    checks: int = 2
    """Times that a written question is answered with the image, and as often without."""


@dataclass(frozen=True, kw_only=True)
class Grading:
    """Open answers that a model behind an API grades."""

    model: ModelCost = ModelCost()
    answers: float = 0
    """Distinct answers per question."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Verdicts of a judge."""

    model: ModelCost = ModelCost()
    calls_model: bool = True
    """False: the source's own truth judges, which costs nothing."""
    splits: Collection[str] = ("train", "validation", "test")
    max_solutions: int | None = None
    """Most solutions of a question; None: all."""
    solutions_per_call: int = 1
    by_step: bool = False
    """A call for each step, with the solution up to it."""
    images: float = 4
    """Images in a prompt."""
    verdict_tokens: float = 25
    """Tokens that the judge generates per step."""
    dollars_per_call: float = 0


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Monte Carlo's continuations of solutions."""

    mode: str = "uncertain"
    """uncertain, all, first_error or verify: which prefixes are continued."""
    splits: Collection[str] = ("train",)
    max_solutions: int | None = None
    """Most solutions of a question; None: all."""
    right_is_free: bool = False
    """Solutions with the right answer are left out, or show without a continuation that it can be reached."""
    uncertain_share: float = 0.1
    """Share of judged steps of which the judge is unsure."""
    max_share: float = 1.0
    """Most steps of a question that mode uncertain continues, as a share of all its steps."""
    continuations: int = 4
    dollars_per_continuation: float = 0
    """Of a policy behind an API; 0: the policy on our own GPUs."""


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Search trees."""

    questions: int = 0
    """Questions with a tree."""
    nodes: int = 60
    """Nodes of a tree, at most."""
    node_rollouts: float = 6
    """Mean rollouts of a node."""
    max_tokens: float | None = None
    """Most tokens generated for one tree."""


@dataclass(frozen=True, kw_only=True)
class Reviewing:
    """Steps that experts review."""

    steps: int = 1000
    dollars_per_step: float = 0.5
    """A minute of a resident at $30 an hour."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the cost of a run."""

    workload: Workload
    policy: ModelCost = ModelCost(parameters=8.03e9)
    training: Training = Training()
    writing: QuestionWriting = QuestionWriting()
    grading: Grading = Grading()
    judging: Judging = Judging()
    rollouts: Rollouts = Rollouts()
    trees: Trees = Trees()
    reviewing: Reviewing = Reviewing()
    hardware: Hardware = field(default_factory=Hardware)
    max_dollars: Mapping[str, float] = field(default_factory=dict)
    """Hard budgets by step."""
    known_gpu_hours: Mapping[str, float] = field(default_factory=dict)
    """GPU-hours by step that were measured or published; they replace the arithmetic."""


PUBLISHED = Plan(
    workload=Workload(
        train_questions=10_000, test_questions=0, train_samples=64, test_samples=64, images=10_000, steps=10
    ),
    judging=Judging(max_solutions=1, dollars_per_call=0.25),
    rollouts=Rollouts(dollars_per_continuation=0.01),
    known_gpu_hours={"train_two_tower": 4 * 48},
)
"""The framework's own budget: $2,500 + $400 + $500 + $480 for 100,000 step labels and 48 hours on four A100."""
