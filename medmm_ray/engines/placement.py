"""On which machines work with GPUs runs, by Ray's labels of nodes; the groups of all clusters in `cluster/` have them.

A group that starts at zero grows when an actor asks for its labels; Ray's own `accelerator_type` does not do that. Spot
machines come first by the groups' `priority`, and others where there are none to rent: a selector of spot with Ray's
`fallback_strategy` would ask for spot again and again, as Ray 2.60's autoscaler ranks labels above what is to be had.
"""

from typing import Any

from medmm_ray.config import Config, execution

ACCELERATOR = "ray.io/accelerator-type"


class GpuPlacement(Config):
    """Which machines a step with GPUs takes; work without a GPU takes any."""

    accelerator_type: str | None = execution(None)
    """Kind of GPU, as the machines' label ray.io/accelerator-type has it (A100, H100, L4); null: any."""
    label_selector: dict[str, str] = execution({})
    """Further labels of the machines, with Ray's operators: {ray.io/market-type: on-demand} takes no spot machine."""


def selector_of(config: GpuPlacement, num_gpus: float) -> dict[str, str]:
    """The labels of machines that an actor or a worker with `num_gpus` takes; empty: any machine."""
    if not num_gpus:
        return {}
    kind = {} if config.accelerator_type is None else {ACCELERATOR: config.accelerator_type}
    return kind | config.label_selector


def actor_placement(config: GpuPlacement, num_gpus: float) -> dict[str, Any]:
    """Ray's options that place an actor or a task with `num_gpus`."""
    selector = selector_of(config, num_gpus)
    return {"label_selector": selector} if selector else {}
