"""What judging costs, before it runs."""

from medmm_ray.estimate import BYTES_PER_TOKEN, Line, ModelCost, Sizes, at_most
from medmm_ray.steps.judge.config import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine

VERDICT_TOKENS = {"json": 70, "lines": 6}  # that a judge generates a step


def judge_cost(config: JudgeConfig, sizes: Sizes, model: ModelCost) -> Line:
    """The line of the judge; `model` is what its engine runs or asks."""
    questions = solutions = 0
    for split_questions, samples in sizes.by_split(config.splits):
        questions += split_questions
        solutions += split_questions * at_most(samples, config.max_solutions)
    steps = solutions * sizes.steps
    if isinstance(config.engine, PhantomEngine):
        return Line(step="judge", work=f"{steps:,.0f} steps by the source's truth")
    by_step = config.granularity == "step"
    calls = steps if by_step else solutions / config.solutions_per_call
    shared_tokens = sizes.prefix_tokens(config.num_documents) + _images(config, config.engine) * model.image_tokens
    # A call for each step has the solution up to it: half of it, in the mean.
    repeats = (sizes.steps + 1) / 2 if by_step else 1
    input_tokens = calls * shared_tokens + solutions * sizes.solution_tokens * repeats
    output_tokens = steps * VERDICT_TOKENS[config.reply]
    uncached = dollars = model.dollars(input_tokens, output_tokens)
    notes: tuple[str, ...] = ()
    if config.warm_cache and model.cached_input_price is not None:
        # Of what a question's calls after the first one share; prices are US dollars a million tokens.
        cached_tokens = max(0, calls - questions) * shared_tokens
        dollars += cached_tokens * (model.cached_input_price - model.input_price) / 1e6
    if uncached > dollars:  # a cache holds for minutes: who asks slowly pays in full
        notes = (f"judge counts on the provider's prompt cache; without it: ${uncached:,.0f}",)
    return Line(
        step="judge",
        work=f"{steps:,.0f} steps in {calls:,.0f} calls",
        calls=calls,
        tokens=input_tokens + output_tokens,
        dollars=dollars,
        gpu_hours=model.gpu_hours(sizes.hardware, input_tokens, output_tokens),
        stored=output_tokens * BYTES_PER_TOKEN,
        notes=notes,
    )


def _images(config: JudgeConfig, engine: JudgeVllm | JudgeApi) -> int:
    """Images in a prompt: the question's, and one of each similar case, as many as the engine takes."""
    limit = engine.num_images if isinstance(engine, JudgeVllm) else engine.max_images
    return min(1 + config.num_references, limit)
