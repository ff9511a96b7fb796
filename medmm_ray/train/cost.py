"""What the trainings cost, before they run; 0 epochs where a model is given."""

from medmm_ray.estimate import BF16, PATCHES, Line, Sizes
from medmm_ray.train.policy import PolicyConfig
from medmm_ray.train.text_prm import TextPrmConfig
from medmm_ray.train.two_tower import TwoTowerConfig

FUSION_PARAMETERS = 30e6


def train_policy_cost(config: PolicyConfig, sizes: Sizes) -> Line:
    """The line of the policy's training, one worked solution a question."""
    tokens = sizes.train_questions * (sizes.question_tokens + sizes.solution_tokens) * config.epochs
    return Line(
        step="train_policy",
        work=f"{config.epochs} epochs",
        tokens=tokens,
        gpu_hours=sizes.hardware.training_hours(sizes.policy.parameters, tokens),
        stored=sizes.policy.parameters * BF16 if config.epochs else 0,
    )


def train_text_prm_cost(config: TextPrmConfig, sizes: Sizes) -> Line:
    """The line of the text tower's training."""
    tokens = sizes.packed_tokens(config.num_documents, config.max_solutions) * config.epochs
    return Line(
        step="train_text_prm",
        work=f"{config.epochs} epochs, packed",
        tokens=tokens,
        gpu_hours=sizes.hardware.training_hours(sizes.text_parameters, tokens),
        stored=sizes.text_parameters * BF16,
    )


def train_two_tower_cost(config: TwoTowerConfig, sizes: Sizes) -> Line:
    """The line of the image part's training."""
    hardware = sizes.hardware
    image_tokens = sizes.train_questions * (1 + config.num_references) * PATCHES * config.epochs
    # The text tower does not run here: a step is one state that was stored.
    steps = sizes.train_questions * sizes.train_samples * sizes.steps * config.epochs
    image_hours = hardware.training_hours(sizes.image_parameters, image_tokens)
    return Line(
        step="train_two_tower",
        work=f"{config.epochs} epochs on stored states",
        tokens=image_tokens + steps,
        gpu_hours=image_hours + hardware.training_hours(FUSION_PARAMETERS, steps),
        stored=(sizes.text_parameters + sizes.image_parameters + FUSION_PARAMETERS) * BF16,
    )
