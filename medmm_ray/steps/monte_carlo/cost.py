"""What Monte Carlo costs, before it runs."""

import math

from medmm_ray.estimate import Line, Sizes, at_most
from medmm_ray.steps.monte_carlo.config import MonteCarloConfig


def monte_carlo_cost(config: MonteCarloConfig, sizes: Sizes, max_judged: int | None) -> Line:
    """The line of Monte Carlo, where at most `max_judged` solutions of a question are judged (None: all)."""
    prefixes = 0.0
    for questions, samples in sizes.by_split(config.splits):
        prefixes += questions * _prefixes(config, sizes, samples, max_judged)
    calls = prefixes * config.rollouts_per_prefix
    # A step lies halfway through its solution, in the mean.
    input_tokens = prefixes * (sizes.prefix_tokens(config.num_documents) + sizes.solution_tokens / 2)
    output_tokens = calls * sizes.solution_tokens / 2
    return Line(
        step="monte_carlo",
        work=f"{config.mode}: {prefixes:,.0f} steps x {config.rollouts_per_prefix}",
        calls=calls,
        tokens=input_tokens + output_tokens,
        gpu_hours=sizes.policy.gpu_hours(sizes.hardware, input_tokens, output_tokens),
        notes=_notes(config, sizes),
    )


def _prefixes(config: MonteCarloConfig, sizes: Sizes, samples: int, max_judged: int | None) -> float:
    """Prefixes of one question's solutions that are continued; a wrong solution's last step needs no continuation."""
    # Of a solution with s steps: all but the last, log2 s of them by bisection, or the two at the judge's first error.
    solutions = at_most(samples, config.max_solutions)
    share = sizes.wrong_share if _right_is_free(config) else 1.0
    judged = at_most(solutions, max_judged) * share
    if config.mode == "uncertain":
        uncertain = judged * sizes.steps * sizes.uncertain_share
        return min(uncertain, samples * sizes.steps * config.max_share)
    if config.mode == "verify":
        return judged * min(2, sizes.steps - 1)
    if config.mode == "first_error":
        return solutions * share * math.log2(sizes.steps)
    return solutions * share * (sizes.steps - 1)


def _right_is_free(config: MonteCarloConfig) -> bool:
    """Whether solutions with the right answer are left out, or show for each prefix that it can be reached from it."""
    is_shown = not config.threshold and (config.stop_early or config.searches)
    return config.wrong_only or is_shown


def _notes(config: MonteCarloConfig, sizes: Sizes) -> tuple[str, ...]:
    assumptions = []
    if _right_is_free(config):
        assumptions.append(f"{sizes.wrong_share:.0%} of the answers are wrong")
    if config.mode == "uncertain":
        assumptions.append(f"{sizes.uncertain_share:.0%} of the steps are uncertain")
    return (f"monte_carlo assumes that {' and that '.join(assumptions)}",) if assumptions else ()
