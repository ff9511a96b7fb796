"""How much load a replica takes, and how many replicas there are: the settings, and what Serve is told of them."""

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from medmm_ray.config import execution
from medmm_ray.engines.placement import GpuPlacement
from medmm_ray.service.batching import BatchLimits

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
DELAY = Annotated[float, Field(ge=0)]
LOAD = "medmm_load"
"""The figure that a replica reports to Serve: seconds of work that waits, by `target_wait_s`."""


class LoadConfig(GpuPlacement):
    """What a replica lets in, and by what the number of replicas follows the load."""

    token_budget: Annotated[int, Field(ge=256)] | None = execution(None)
    """Tokens of one forward pass, prompts included; none: 1,024 on a CPU, 4,096 on a GPU."""
    max_pass_s: Seconds = execution(0.1)
    """Seconds that one forward pass may take: passes are cut smaller where the measured rate asks for it, so that a
    short request waits at most so long for a long one's pass."""
    prefix_cache_mb: Annotated[int, Field(ge=0)] = execution(512)
    """MiB of keys and values of prefixes (question, documents, images) kept between requests in a replica; 0: none."""
    max_wait_s: Seconds = execution(2.0)
    """Expected wait, tokens that wait by the measured rate, above which a request is answered with 429."""
    max_tokens: Count = execution(1 << 18)
    """Tokens of a request, what its solutions share counted once; more are answered with 413."""
    request_timeout_s: Seconds = execution(120.0)
    """Seconds from a request's last byte to its scores; later it is answered with 408 and not scored. A client asks for
    less with `X-Request-Timeout`."""
    body_timeout_s: Seconds = execution(30.0)
    """Seconds for a request's body to arrive; slower senders are answered with 408."""
    max_body_mb_in_flight: Count = execution(512)
    """MiB of bodies that a replica holds at once; more are answered with 429."""
    max_pixels_in_flight: Count = execution(400_000_000)
    """Pixels of decoded images that a replica holds at once; more are answered with 429."""
    stuck_s: Seconds = execution(120.0)
    """Seconds without progress, while requests wait, after which a replica is not ready and is replaced."""
    max_ongoing_requests: Count = execution(1000)
    """Connections that a replica holds at once, also those that still send. What waits is bounded by `max_wait_s`."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = execution(256)
    """Requests that a proxy holds while every replica has its `max_ongoing_requests`, or starts; -1: no bound."""
    traces_endpoint: str | None = execution(None)
    """Where OpenTelemetry spans of requests are sent (OTLP over HTTP), such as http://collector:4318/v1/traces; none:
    there are none."""
    num_replicas: Count = execution(1)
    """Copies of the model, each in a process of its own; without `max_replicas`."""
    min_replicas: Annotated[int, Field(ge=0)] = execution(1)
    """Fewest copies where their number follows the load; 0: none while nobody asks."""
    max_replicas: Count | None = execution(None)
    """Most copies; set, their number follows the load."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = execution(8.0)
    """Requests of a replica, waiting ones included, above which there shall be more replicas."""
    target_wait_s: Seconds = execution(0.5)
    """Seconds of waiting tokens of a replica above which there shall be more replicas."""
    upscale_delay_s: DELAY = execution(10.0)
    """Seconds for which the load must ask for more replicas."""
    downscale_delay_s: DELAY = execution(300.0)
    """Seconds for which the load must ask for fewer."""

    @model_validator(mode="after")
    def _fewest_is_below_most(self) -> "LoadConfig":
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}; swap them")
        return self


def batch_limits(config: LoadConfig, default_budget: int) -> BatchLimits:
    """The batcher's part of the settings; `default_budget` is the model's own, in tokens of a pass."""
    return BatchLimits(
        token_budget=config.token_budget or default_budget,
        max_pass_s=config.max_pass_s,
        max_wait_s=config.max_wait_s,
        max_tokens=config.max_tokens,
        stuck_s=config.stuck_s,
    )


def replica_options(config: LoadConfig) -> dict[str, Any]:
    """The options of a Serve deployment that say how many replicas there are, and what each holds."""
    # Serve's own queue stays short: a request waits where its wait is known.
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        # A replica that is replaced answers what it has.
        "graceful_shutdown_timeout_s": config.request_timeout_s + config.body_timeout_s,
        "health_check_period_s": 10,
    }
    if config.max_replicas is None:
        return {**options, "num_replicas": config.num_replicas}
    scaling = {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        # The mean of half a minute would hide a step that a delay of ten seconds is meant to answer.
        "look_back_period_s": max(2.0, min(30.0, config.upscale_delay_s)),
        "policy": {"policy_function": f"{__name__}:{wanted_replicas.__name__}"},
    }
    return {**options, "autoscaling_config": scaling}


def wanted_replicas(context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: as many replicas as requests and waiting tokens ask for, whichever are more.

    Delays and bounds are Serve's. Replicas report their waiting tokens as `LOAD`.
    """
    # From zero Serve starts the first replica by itself.
    assert context.config is not None
    by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
    loads = (context.aggregated_metrics or {}).get(LOAD, {})
    # Of replicas that have not reported yet nothing is known; their requests count.
    by_tokens = math.fsum(loads.values())
    return max(by_requests, by_tokens), {}
