"""A request while it is scored: its different solutions, packed, and what is known of each so far."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medmm_ray.reward_model.errors import ImageError
from medmm_ray.reward_model.packing import Branch, ImageEmbeddings, Packing
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates

if TYPE_CHECKING:
    from PIL.Image import Image

    from medmm_ray.reward_model.model import RewardModel


class ScoringJob:
    """Carries its request; equal solutions of it are read once.

    `packing` is what is to be read. A solution that cannot be read has its error from the start.
    """

    def __init__(self, model: "RewardModel", request: ScoreRequest) -> None:
        self.model, self.request = model, request
        # Samples of a policy repeat themselves: what is equal is read once.
        self._keys = [s if isinstance(s, str) else tuple(s) for s in request.solutions]
        self._unique = list(dict.fromkeys(self._keys))
        self.packing = self._pack()
        self._states: dict[int, SolutionStates] = {}
        for i, error in enumerate(self.packing.errors):
            if error:
                self._states[i] = model.error_states(error)

    def _pack(self) -> Packing:
        request = self.request
        try:
            image_embeddings = self._embed(request.images, request.reference_images) if self.model.vision else None
        except ImageError as error:
            return Packing([], [str(error)] * len(self._unique))
        return self.model.pack(request.question, self._unique, request.documents, image_embeddings=image_embeddings)

    def _embed(self, images: Sequence["Image"], references: Sequence["Image"]) -> ImageEmbeddings | None:
        if references:
            raise ValueError(
                f"{len(references)} reference images: a reward model of the family {self.model.family.name} knows a "
                "question's own images alone; leave reference_images empty"
            )
        assert self.model.vision is not None
        return self.model.vision.embed(self.model.text_model, images) if images else None

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
