"""What one request may hold."""

from medmm_ray.service.config import ServeConfig
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import Case, steps_of


def check_size(request: Case, config: ServeConfig) -> None:
    """Refuse with 413, before any work, what is more than one request may hold."""
    # Of too many solutions only so many are split: the first check refuses the request anyway.
    num_steps = [len(steps_of(solution)) for solution in request.solutions[: config.max_solutions]]
    for name, number, limit in (
        ("solutions", len(request.solutions), config.max_solutions),
        ("steps of a solution", max(num_steps), config.max_steps),
        ("documents", len(request.documents), config.max_documents),
        ("reference_images", len(request.reference_images), config.max_reference_images),
    ):
        if number > limit:
            detail = f"{number} {name}; at most {limit} are allowed: send fewer, or several requests"
            raise Problem(Kind.TOO_LARGE, detail)
