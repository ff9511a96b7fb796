"""Multimodal process reward models for medicine, on Ray.

Importing the package, or any step of it, loads no model library: each engine imports its own in its constructor, and
`RewardModel` is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel as RewardModel

__version__ = "0.1.0"
__all__ = ["RewardModel"]


def __getattr__(name: str) -> Any:
    if name == "RewardModel":
        from medmm_ray.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
