"""The reward of a solution in reinforcement learning, and which step gets which part of it.

Rewards of steps are not summed: a policy learns to write many steps that score well (Cheng et al. 2025, "Stop
Summation: Min-Form Credit Assignment Is All Process Reward Model Needs for Reasoning", arXiv 2504.15275). PURE, theirs:

    r_t = p_t - (1 - p_t)                 in [-1, 1], from the probability p_t that step t is right
    c_t = r_t * softmax_t(-r / T)         the step's credit
    R   = sum of the c_t                  near min r_t for a small T; T = 0: exactly that

so that the worst step bears almost all of the reward, and one more good step adds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmm_ray.stats.metrics import finite

PURE_TEMPERATURE = 0.1  # of PURE's code
LEAST_REWARD = -1.0
"""The process reward of what cannot be scored, the least there is: to write such a thing must not pay."""


@dataclass(frozen=True)
class Credit:
    """A solution's process reward in [-1, 1], and the credit of each step: they add up to it."""

    reward: float
    steps: list[float]


def min_form(probabilities: Sequence[float], temperature: float = PURE_TEMPERATURE) -> Credit:
    """PURE's reward of a solution from its steps' probabilities; without steps the least reward.

    Raises ValueError where a probability is not finite or `temperature` is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected 0 (the minimum itself) or more")
    if not len(probabilities):
        return Credit(LEAST_REWARD, [])
    rewards = 2.0 * finite("step probabilities", probabilities) - 1.0
    if temperature == 0:
        weights = np.zeros(rewards.size)
        weights[rewards.argmin()] = 1.0  # of equal ones the first: the reasoning went wrong there
    else:
        # Less the largest exponent, which is 0 then: no power overflows.
        powers = np.exp((rewards.min() - rewards) / temperature)
        weights = powers / powers.sum()
    credits = weights * rewards
    return Credit(float(credits.sum()), credits.tolist())


def overlong_penalty(length: int, longest: int, margin: int) -> float:
    """DAPO's soft punishment of long solutions, in [-1, 0] (Yu et al. 2025, arXiv 2503.14476, equation 13).

    0 up to ``longest - margin``, from there on a straight line down to -1 at `longest`, -1 beyond. `margin` 0: a step.
    """
    overshoot = length - (longest - margin)
    if overshoot <= 0:
        return 0.0
    if length >= longest:
        return -1.0
    return -overshoot / margin
