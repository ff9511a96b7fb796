"""What states and scores cost, before they are computed."""

from medmm_ray.estimate import BF16, Line, Sizes, at_most
from medmm_ray.steps.score.config import ScoreConfig, StatesConfig

SCORE_BYTES = 3 * 2 * 4  # of one step: three arms, text and image part, as float32


def states_cost(config: StatesConfig, sizes: Sizes) -> Line:
    """The line of the training split's states."""
    steps = sizes.train_questions * at_most(sizes.train_samples, config.max_solutions) * sizes.steps
    tokens = sizes.packed_tokens(config.num_documents, config.max_solutions)
    bytes_a_step = 2 * sizes.hidden_size * BF16  # the state at the tag and the step's summary
    return Line(
        step="states",
        work=f"{steps:,.0f} steps at {bytes_a_step / 1024:g} KiB",
        tokens=tokens,
        gpu_hours=sizes.hardware.prefill_hours(sizes.text_parameters, tokens),
        stored=steps * bytes_a_step,
    )


def score_cost(config: ScoreConfig, sizes: Sizes) -> Line:
    """The line of the test split's scores; a question's solutions share its prefix."""
    solutions = sizes.test_questions * sizes.test_samples
    prefix_tokens = sizes.test_questions * sizes.prefix_tokens(config.num_documents)
    tokens = prefix_tokens + solutions * sizes.solution_tokens
    return Line(
        step="score",
        work=f"{solutions:,} solutions, prefix shared",
        tokens=tokens,
        gpu_hours=sizes.hardware.prefill_hours(sizes.text_parameters, tokens),
        stored=solutions * sizes.steps * SCORE_BYTES,
    )
