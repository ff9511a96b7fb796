"""What writing questions costs, before it runs."""

from medmm_ray.config import ConfigError
from medmm_ray.estimate import Line, ModelCost, Sizes
from medmm_ray.steps.write_questions import WriteQuestionsConfig

# Tokens around a question: of the prompts, and of the JSON that answers them. Thoughts are left out.
WRITE_PROMPT, WRITE_REPLY, CHECK_PROMPT, CHECK_REPLY = 250, 180, 70, 10


def write_questions_cost(config: WriteQuestionsConfig, sizes: Sizes, model: ModelCost) -> Line:
    """The line of the writer; `model` is what its engine runs or asks."""
    questions = _images(config, sizes) * config.per_image
    checks = 2 * config.num_checks  # half of them with the image
    check_tokens = checks * (CHECK_PROMPT + sizes.question_tokens) + config.num_checks * model.image_tokens
    input_tokens = questions * (WRITE_PROMPT + model.image_tokens + check_tokens)
    output_tokens = questions * (WRITE_REPLY + checks * CHECK_REPLY)
    return Line(
        step="write_questions",
        work=f"{questions:,} questions, each tried {checks} times",
        calls=questions * (1 + checks),
        tokens=input_tokens + output_tokens,
        dollars=model.dollars(input_tokens, output_tokens),
        gpu_hours=model.gpu_hours(sizes.hardware, input_tokens, output_tokens),
    )


def _images(config: WriteQuestionsConfig, sizes: Sizes) -> int:
    """Images for which questions are written."""
    limits = [limit for limit in (sizes.written_images, config.max_images) if limit is not None]
    if not limits:
        raise ConfigError(
            "the number of images without a question is not known before the source is read; say plan.written_images=N "
            "or write_questions.max_images=N"
        )
    return min(limits)
