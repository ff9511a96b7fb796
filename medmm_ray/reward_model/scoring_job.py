"""A request while it is scored: its different solutions, packed, and what is known of each so far."""

from collections.abc import Callable, Sequence

from medmm_ray.reward_model.full_sequence import Solution
from medmm_ray.reward_model.packing import Branch, Packing
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates


class ScoringJob:
    """Carries its request; equal solutions of it are read once.

    `pack` packs solutions of a request, `error_states` makes what stands for one that cannot be read. `packing` is what
    is to be read; a solution with an error there has it from the start.
    """

    def __init__(
        self,
        request: ScoreRequest,
        pack: Callable[[ScoreRequest, Sequence[Solution]], Packing],
        error_states: Callable[[str], SolutionStates],
    ) -> None:
        self.request = request
        # Samples of a policy repeat themselves: what is equal is read once.
        self._keys = [s if isinstance(s, str) else tuple(s) for s in request.solutions]
        self._unique = list(dict.fromkeys(self._keys))
        self.packing = pack(request, self._unique)
        self._states: dict[int, SolutionStates] = {}
        for i, error in enumerate(self.packing.errors):
            if error:
                self._states[i] = error_states(error)

    def add(self, branch: Branch, states: SolutionStates) -> None:
        """Note what was read of the solution of a branch."""
        self._states[branch.solution] = states

    @property
    def is_complete(self) -> bool:
        """Whether every solution was read or has an error."""
        return len(self._states) == len(self._unique)

    def states(self) -> list[SolutionStates]:
        """One entry a solution, in the request's order, equal ones repeated."""
        by_key = {key: self._states[i] for i, key in enumerate(self._unique)}
        return [by_key[key] for key in self._keys]
