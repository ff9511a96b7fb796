"""What a replica asks of another deployment: its answer, or a `Problem` that the client can act upon."""

import asyncio
from typing import Any

from medmm_ray.service.problems import Kind, Problem

COME_AGAIN_S = 5.0


async def answer_of(response: Any) -> Any:
    """The answer to a call of a Serve handle. Raises `Problem` (503) where no replica lives to give it.

    Where the caller is cancelled, so is the call.
    """
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

    gone = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)
    try:
        return await response
    except gone as error:
        detail = f"a part of the service does not answer now ({type(error).__name__}); send the request again"
        raise Problem(Kind.UNAVAILABLE, detail, retry_after_s=COME_AGAIN_S) from error
    # Serve does not cancel a call because nobody awaits it any more.
    except asyncio.CancelledError:
        response.cancel()
        raise
