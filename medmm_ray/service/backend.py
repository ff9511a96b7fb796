"""What every route works with: the model behind one function, what it can read, and the limits of a request."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import decode_image
from medmm_ray.service.admission import Budget, Check
from medmm_ray.service.audit import tally
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.evidence import EvidenceQuery, EvidenceRequest, EvidenceSource, RetrievedEvidence
from medmm_ray.service.limits import check_size
from medmm_ray.service.metrics import ServiceMetrics
from medmm_ray.service.policy import Policy
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.readiness import Readiness, Scorer
from medmm_ray.service.rerank import (
    Case,
    ModelInput,
    ModelTraits,
    RerankAnswer,
    RerankRequest,
    Scored,
    from_base64,
    rerank,
    stated_answers,
    to_model_input,
)

T = TypeVar("T")
StepMaps = list[list[list[float]]]


class StepAttention(Protocol):
    """Where one step's attention lies (`reward_model.StepAttention`)."""

    @property
    def weights(self) -> list[list[float]]:
        """Of the image's patches, [R, C]; they add up to 1."""

    @property
    def share(self) -> float:
        """What these patches have of the whole attention."""


class PatchAttention(Protocol):
    """Where the attention of all steps lies (`reward_model.occlusion.PatchAttention`)."""

    @property
    def area(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the patches, as shares of the image."""

    @property
    def solutions(self) -> Sequence[Sequence[StepAttention]]:
        """That of each solution's steps."""


@dataclass(frozen=True)
class TileMaps:
    """For each solution a map a step (`reward_model.occlusion`); `num_tokens`: their cost, in tokens of the model;
    `attention`: None where the model's fusion reads no patches."""

    solutions: Sequence[StepMaps]
    num_tokens: int = 0
    attention: PatchAttention | None = None


MapTiles = Callable[[ModelInput], Awaitable[TileMaps]]
"""From a request's model input to its maps."""


def no_check() -> None:
    """Let every request in."""


@dataclass(frozen=True)
class Backend:
    """The served model as the routes see it; `fingerprint` names its weights."""

    score: Scorer
    config: ServeConfig
    traits: ModelTraits
    readiness: Readiness
    fingerprint: str = ""
    evidence: EvidenceSource | None = None
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
    check: Check = no_check
    """Raises a `Problem` where the replica has too much to do for another request."""
    policy: Policy | None = None
    """What `POST /v1/best_of_n` samples from."""
    map_tiles: MapTiles | None = None
    """Where in the image scores come from; None where the model has no image tower."""
    pixels: Budget | None = None
    """Another model's `pixels_held`, which is the replica's; None: its own."""

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return self.config.served_model_name or str(self.config.model)

    async def model_input(self, case: Case) -> tuple[ModelInput, RetrievedEvidence | None]:
        """A case as the model reads it, and what was retrieved for it; what it must not hold is a `Problem`."""
        # The cheapest checks come first: what they refuse has cost nothing yet. In a thread, as all that takes a while.
        await asyncio.to_thread(check_size, case, self.config)
        case, evidence = await self._with_evidence(case)
        if case.image is not None and not self.traits.has_image_tower:
            raise Problem(Kind.INVALID, f"image: the model {self.model} has no image tower; leave the image out")
        try:
            model_input = await asyncio.to_thread(to_model_input, case, self.config.max_image_pixels)
        except RowError as error:
            raise _problem(error) from error
        return model_input, evidence

    async def score_case(self, case: Case) -> Scored:
        """The log-odds of a case's solutions, in order."""
        model_input, evidence = await self.model_input(case)
        return replace(await self._score(model_input), evidence=evidence)

    async def _score(self, model_input: ModelInput) -> Scored:
        """The log-odds of a model input's solutions, counted."""
        with self.pixels_held.held(model_input.num_pixels):
            scored = await self.score(model_input)
        self.metrics.add_scores(scored, self.model)
        num_unscored = sum(solution.error is not None for solution in scored.solutions)
        tally().add(model_input, self.fingerprint, num_unscored, scored.num_tokens or 0)
        return scored

    async def _with_evidence(self, case: Case) -> tuple[Case, RetrievedEvidence | None]:
        """A case with what its `retrieve` asks for behind its own documents and reference images."""
        wanted = case.retrieve
        if wanted is None or not (wanted.documents or wanted.images):
            return case, None
        if self.evidence is None:
            raise Problem(Kind.INVALID, "retrieve: no index is served (retrieval); send the documents themselves")
        if wanted.images and case.image is None:
            raise Problem(Kind.INVALID, f"retrieve: {wanted.images} similar images of none; send an image")
        self._check_evidence(wanted)
        image = await self._image(case, is_searched_by=wanted.images > 0)
        found = await self.evidence(
            EvidenceQuery(
                question=case.question,
                options=case.options,
                image=image,
                num_documents=wanted.documents,
                num_images=wanted.images,
                modality=wanted.modality,
            )
        )
        # What the request has of its own was chosen by somebody: it comes first.
        files = [base64.b64encode(content).decode() for content in found.contents]
        more = {
            "documents": [*case.documents, *(document.text for document in found.documents)],
            "reference_images": [*case.reference_images, *files],
        }
        case = case.model_copy(update=more)
        await asyncio.to_thread(check_size, case, self.config)
        return case, found.answer()

    async def _image(self, case: Case, is_searched_by: bool) -> bytes | None:
        """The bytes of a case's image; decoded once, to refuse here what the index could not read."""
        if case.image is None:
            return None
        try:
            content = from_base64("image", case.image)
            if is_searched_by:
                await asyncio.to_thread(decode_image, content, "image", self.config.max_image_pixels)
        except RowError as error:
            raise _problem(error) from error
        return content

    def _check_evidence(self, wanted: EvidenceRequest) -> None:
        """Refuse more than the index gives to a request."""
        assert self.config.retrieval is not None
        most = self.config.retrieval.retrieve
        for name, number, limit in (
            ("documents", wanted.documents, most.num_documents),
            ("images", wanted.images, most.num_images),
        ):
            if number > limit:
                raise Problem(Kind.TOO_LARGE, f"retrieve: {number} {name}; at most {limit} are looked up")

    @cached_property
    def pixels_held(self) -> Budget:
        """Pixels of the images that are decoded and not scored."""
        return self.pixels or Budget("pixels of images", self.config.max_pixels_in_flight)

    async def tile_maps(self, case: Case) -> TileMaps:
        """For each solution of a case a map a step."""
        if self.map_tiles is None:
            raise Problem(Kind.INVALID, f"the model {self.model} has no image tower, so no score comes from its tokens")
        model_input, _ = await self.model_input(case)
        if model_input.image is None:
            raise Problem(Kind.INVALID, "image: required, but missing")
        with self.pixels_held.held(model_input.num_pixels):
            maps = await self.map_tiles(model_input)
        tally().add(model_input, self.fingerprint, 0, maps.num_tokens)
        return maps

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """The answer to a rerank request."""
        model_input, evidence = await self.model_input(request)
        scoring = asyncio.ensure_future(self._score(model_input))
        try:
            # What is refused is refused at once, before anything else is done for it.
            await asyncio.wait([scoring], timeout=0)
            if scoring.done():
                scoring.result()
            # While the model reads: the answers do not depend on its scores. In a thread, as long texts take a while.
            answers = await asyncio.to_thread(stated_answers, request)
            scored = replace(await scoring, evidence=evidence)
        finally:
            scoring.cancel()
        return await asyncio.to_thread(
            rerank,
            request,
            scored,
            self.model,
            self.traits.warnings(request),
            answers,
        )


def _problem(error: RowError) -> Problem:
    """What a client is told of an image that cannot be used."""
    return Problem(Kind.TOO_LARGE if error.kind.endswith("_too_large") else Kind.INVALID, str(error))


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all parts, run at once; where one raises the others are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        # Of a finished task this does nothing; a task group would hide the problem in a group of them.
        for task in tasks:
            task.cancel()
