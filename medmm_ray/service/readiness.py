"""Is the service able to score? It is where the model is loaded, nothing is stuck, and one tiny case has its score."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import ModelInput, Scored, StepLogOdds

Scorer = Callable[[ModelInput], Awaitable[Scored]]
"""From a request's model input to the log-odds of its solutions' steps, one entry a solution."""

TINY_CASE = ModelInput(
    question="Is 1 + 1 = 2? (A) yes (B) no",
    solutions=(("One and one are two.", "So the answer is (A)."),),
    documents=(),
    image=None,
    reference_images=(),
    context_key="ready",
)
"""What readiness is tried on: a few dozen tokens."""

TOLERANCE = 1e-2  # log-odds; bfloat16 rounds by the batch that a request is in
INTERVAL_S = 5.0  # a probe each second from several balancers shall not score each time
TIMEOUT_S = 10.0


def not_stuck() -> str | None:
    """What `Readiness` asks where nothing watches for standstill."""
    return None


@dataclass
class Readiness:
    """What is known of the model's health; `expected` are the tiny case's log-odds when the model was loaded.

    `stuck` says what hangs, or None.
    """

    expected: Sequence[float]
    stuck: Callable[[], str | None] = not_stuck
    _fault: str | None = None
    _checked: float = -math.inf

    async def fault(self, score: Scorer) -> str | None:
        """Why the service is not ready, or None; `score` is tried at most once in five seconds."""
        if hanging := self.stuck():
            return hanging
        if time.monotonic() - self._checked < INTERVAL_S:
            return self._fault
        self._checked = time.monotonic()  # before the trial: those that ask meanwhile do not start another
        self._fault = await self._try(score)
        return self._fault

    async def _try(self, score: Scorer) -> str | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                scored = await score(TINY_CASE)
        except TimeoutError:
            return f"a tiny case was not scored within {TIMEOUT_S:g} s"
        except Problem as problem:
            # Busy is not broken: a balancer that took it out would only send its load to the others.
            return None if problem.kind is Kind.OVERLOADED else f"a tiny case was not scored: {problem.detail}"
        except Exception as error:  # noqa: BLE001  # whatever it is: the model does not score
            return f"a tiny case was not scored: {type(error).__name__}"
        return self._difference(scored.solutions[0])

    def _difference(self, score: StepLogOdds) -> str | None:
        if score.error is not None:
            return f"a tiny case was not scored: {score.error}"
        values = [text + image for text, image in zip(score.text_log_odds, score.image_log_odds, strict=True)]
        # NaN is close to nothing, so that it fails here.
        pairs = zip(values, self.expected, strict=True)
        if not all(math.isclose(value, expected, abs_tol=TOLERANCE, rel_tol=TOLERANCE) for value, expected in pairs):
            return "a tiny case has another score than when the model was loaded"
        return None
