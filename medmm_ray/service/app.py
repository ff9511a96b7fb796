"""The reward model as a Ray Serve application.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32) \\
        serve run medmm_ray.serve:build_app model=runs/quickstart/two_tower num_gpus=1

Enters: a checkpoint folder. Leaves: `POST /v1/rerank`, `GET /v1/model`, `GET /health`, and the OpenAPI page at `/docs`.
Scores come from `RewardModel.score`, the function that the `score` step uses, so that online and offline agree.

Without a token the application answers only requests that arrive at this machine's loopback address; with one (the
environment variable that `token_env` names) every request for data must carry ``Authorization: Bearer <token>``. Ray's
own token mode does not protect the Serve port, but the replicas' other ports, of which one listens on every address and
unpickles what arrives: nothing is served in a Ray without it. Logs hold counts and seconds, never text.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from medmm_ray import __version__
from medmm_ray.config import ConfigError, build, execution, parse_overrides
from medmm_ray.data.tables import RowError, follow
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.images import MAX_PIXELS
from medmm_ray.engines.placement import GpuPlacement, actor_placement
from medmm_ray.service.guard import Guard, is_loopback, sha256
from medmm_ray.service.rerank import (
    ModelInput,
    ModelTraits,
    RerankAnswer,
    RerankRequest,
    StepLogOdds,
    rerank,
    steps_of,
    to_model_input,
)
from medmm_ray.session import has_token_mode

if TYPE_CHECKING:
    from ray import serve

    from medmm_ray.reward_model import RewardModel

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file

# Faults of a request by kind; every other kind is 422.
STATUS = {"image_too_large": 413}

Count = Annotated[int, Field(ge=1)]


class ServeConfig(GpuPlacement):
    """The served reward model: which one, how many replicas, and what one request may hold."""

    model: str | None = execution(None)
    """Checkpoint that `RewardModel.from_pretrained` reads, such as <run>/two_tower, the latest of a run; required (in
    a recipe: the run's own by default)."""
    dtype: Literal["float32", "bfloat16", "float16"] = execution("float32")
    """Number format of the weights; bfloat16 on GPUs."""
    device: str = execution("cpu")
    """Torch device of each replica: cpu or cuda."""
    num_replicas: Count = execution(1)
    """Copies of the model, each in a process of its own."""
    num_gpus: Annotated[float, Field(ge=0)] = execution(0.0)
    """GPUs per replica."""
    num_cpus: Annotated[float, Field(ge=0)] = execution(1.0)
    """CPUs per replica; Ray gives it as many OpenMP threads."""
    max_batch_size: Count = execution(8)
    """Most requests that a replica scores in one go: those about one case are packed into one pass over its prefix."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = execution(0.005)
    """Seconds that a replica waits for more requests before it scores."""
    max_ongoing_requests: Count = execution(32)
    """Requests that a replica holds at once, waiting ones included; at least `max_batch_size`."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = execution(256)
    """Requests that a proxy holds for busy replicas before it answers 503; -1: no bound."""
    token_budget: Annotated[int, Field(ge=256)] | None = execution(None)
    """Tokens of solutions that one forward pass packs behind the shared prefix."""
    max_solutions: Count = execution(256)
    """Solutions in a request; more are answered with 413."""
    max_steps: Count = execution(64)
    """Steps in a solution; more are answered with 413."""
    max_documents: Annotated[int, Field(ge=0)] = execution(64)
    """Documents in a request; more are answered with 413."""
    max_reference_images: Annotated[int, Field(ge=0)] = execution(8)
    """Reference images in a request; more are answered with 413."""
    max_image_pixels: Count = execution(MAX_PIXELS)
    """Width x height of an image; more is answered with 413 before it is decoded."""
    max_body_mb: Count = execution(64)
    """Size of a request in MiB; more is answered with 413."""
    host: str = execution("127.0.0.1")
    """Address to listen on; any other than loopback needs a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = execution(8000)
    """TCP port to listen on; 0 takes a free one."""
    token_env: str = execution("MEDMM_TOKEN")
    """Name of the environment variable that holds the bearer token; unset or empty: loopback only, no token."""


class Health(BaseModel):
    """The answer of a server that is up."""

    status: Literal["ok"] = "ok"


class ModelCard(BaseModel):
    """What is served, and what one request may hold."""

    model: str
    version: str
    dtype: str
    device: str
    has_image_tower: bool
    """Whether a request may have an image: an image tower looks at it, or the language model itself."""
    num_documents: int | None
    """Documents that the model was trained on, best first; null: it is not known."""
    num_references: int | None
    """Reference images that it was trained on."""
    max_solutions: int
    max_steps: int
    max_documents: int
    max_reference_images: int
    max_image_pixels: int
    max_body_mb: int


class Problem(BaseModel):
    """An error: what is wrong, the value, what was expected."""

    detail: str


Scorer = Callable[[ModelInput], Awaitable[Sequence[StepLogOdds]]]
"""From a request's model input to the log-odds of its solutions' steps, one entry a solution."""


# The application


def api(score: Scorer, config: ServeConfig, traits: ModelTraits, token_sha256: str | None) -> FastAPI:
    """The web application around `score`."""
    app = FastAPI(
        title="medmm_ray",
        version=__version__,
        summary="Scores each step of candidate solutions of a medical question, and puts the solutions in order.",
        responses=_problems(401, 403),
    )
    app.add_middleware(Guard, token_sha256=token_sha256, token_env=config.token_env, max_body_mb=config.max_body_mb)
    # The guard checks the token; this writes it into the OpenAPI page.
    bearer = Depends(HTTPBearer(auto_error=False, description=f"Demanded where {config.token_env} is set."))
    card = _model_card(config, traits)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        """All that is wrong with the body, in one 422."""
        sentences = [_sentence(fault) for fault in error.errors()]
        return JSONResponse({"detail": "; ".join(sentences)}, 422)

    @app.get("/health", summary="Is the server up? Needs no token.")
    async def health() -> Health:
        return Health()

    @app.get("/v1/model", dependencies=[bearer], summary="The served model and the limits of a request")
    async def model() -> ModelCard:
        return card

    @app.post(
        "/v1/rerank",
        dependencies=[bearer],
        summary="Score every step of every solution and rank the solutions",
        responses=_problems(413, 422),
    )
    async def rerank_solutions(request: RerankRequest) -> RerankAnswer:
        """Each step of each solution gets a probability, each solution a rank, each decoding rule its answer."""
        started = time.perf_counter()
        check_size(request, config)
        if request.image is not None and not traits.has_image_tower:
            raise HTTPException(422, f"image: the model {card.model} has no image tower; leave the image out")
        try:
            # Decoding images takes a while: in a thread, so that other requests are read meanwhile.
            model_input = await asyncio.to_thread(to_model_input, request, config.max_image_pixels)
        except RowError as error:
            raise HTTPException(
                STATUS.get(error.kind, 422),
                str(error),
            ) from error
        scores = await score(model_input)
        answer = rerank(request, scores, card.model, traits.warnings(request))
        num_failed = len(answer.solutions) - len(answer.ranking)
        seconds = time.perf_counter() - started
        logger.info(
            "rerank: %d solutions, %d failed, %s, %d warnings, %.3f s",
            len(scores),
            num_failed,
            answer.arm,
            len(answer.warnings),
            seconds,
        )
        return answer

    return app


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI page's entry of these error statuses."""
    return {code: {"model": Problem} for code in codes}


def _model_card(config: ServeConfig, traits: ModelTraits) -> ModelCard:
    shared_fields = set(ModelCard.model_fields) & set(ServeConfig.model_fields)
    limits = config.model_dump(include=shared_fields)
    return ModelCard(version=__version__, **asdict(traits), **limits)


def check_size(request: RerankRequest, config: ServeConfig) -> None:
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
            raise HTTPException(413, f"{number} {name}; at most {limit} are allowed: send fewer, or several requests")


def _sentence(fault: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this service's words: the key, the value, what was expected."""
    if fault["type"] == "json_invalid":
        return f"body: no JSON from character {fault['loc'][-1]} on: {fault['ctx']['error']}"
    key = _key(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown name; known names: {', '.join(RerankRequest.model_fields)}"
    if fault["type"] == "missing":
        return f"{key}: required, but missing"
    value = repr(fault["input"])
    if len(value) > 60:
        value = value[:60] + "…"
    return f"{key}: {value}: {fault['msg']}"


def _key(path: Sequence[str | int]) -> str:
    """The place of an error as a dotted key of the body."""
    parts = [str(part) for part in path if part != "body"]
    # Which member of a union was tried (``list[…]``) is pydantic's word, no key of the body.
    keys = [part for part in parts if part != "constrained-str" and not part.startswith("list[")]
    return ".".join(keys) or "body"


# The deployment


class Reranker:
    """One replica: loads the model, collects requests into batches, scores them on one thread."""

    def __init__(self, config: ServeConfig, token_sha256: str | None) -> None:
        _refuse_without_token_mode()  # a cluster's mode may differ from the driver's; this process opens the port
        # Here, not above: a driver that starts the replicas needs no torch.
        from ray import serve

        from medmm_ray.reward_model import RewardModel

        model = RewardModel.from_pretrained(
            resolve(str(config.model)),
            dtype=config.dtype,
            device=config.device,
        )

        @serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_timeout_s)
        async def score(inputs: list[ModelInput]) -> list[Sequence[StepLogOdds]]:
            """Serve gives the inputs that came within the wait as a list, and each caller its own entry."""
            # In a thread, so that the replica reads the next requests while a batch is scored.
            return await asyncio.to_thread(score_inputs, model, inputs, config.token_budget)

        if model.vision is not None:
            config = config.model_copy(update={"max_reference_images": 0})  # it knows a question's own images alone
        # What it was trained on is known here alone: the driver never reads the checkpoint.
        traits = ModelTraits(model.reads_images, **asdict(model.trained_inputs))
        self._app = api(score, config, traits, token_sha256)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def score_inputs(
    model: "RewardModel",
    inputs: Sequence[ModelInput],
    token_budget: int | None,
) -> list[Sequence[StepLogOdds]]:
    """Score several requests: those about the same case (question, documents, images) share one pass over its prefix.

    One list of scores a request, in order.
    """
    groups: dict[str, list[int]] = {}
    for i, model_input in enumerate(inputs):
        groups.setdefault(model_input.context_key, []).append(i)
    scores: list[Sequence[StepLogOdds]] = [() for _ in inputs]
    for members in groups.values():
        shared = inputs[members[0]]
        solutions: list[str | tuple[str, ...]] = []
        for i in members:
            solutions += inputs[i].solutions
        group_scores = model.score(
            shared.question,
            solutions,
            shared.documents,
            shared.image,
            shared.reference_images,
            token_budget=token_budget,
        )
        # Back to the requests, in the order in which their solutions were put together.
        start = 0
        for i in members:
            end = start + len(inputs[i].solutions)
            scores[i] = group_scores[start:end]
            start = end
    return scores


def build_app(args: Mapping[str, Any]) -> "serve.Application":
    """The Serve application; `args`: fields of `ServeConfig`, as text (``serve run``) or values (a config file)."""
    words = [f"{name}={value}" for name, value in args.items() if isinstance(value, str)]
    values = {**args, **parse_overrides(words)}
    return application(build(ServeConfig, values, "medmm_ray.service.app"))


def application(config: ServeConfig) -> "serve.Application":
    """The deployment of `config`.

    Raises `ConfigError` where it cannot be served, or would be open to anyone: without a bearer token on another host
    than loopback, or in a Ray without token mode.
    """
    from ray import serve

    if config.model is None:
        raise ConfigError("model is not set; name a checkpoint folder: model=runs/quickstart/two_tower")
    # A replica may start in another folder, and later, when a run's name stands for another result; a URI is copied
    # where it is read, so it stays one.
    name = follow(config.model)
    name = name if "://" in name else resolve(name)
    if config.max_ongoing_requests < config.max_batch_size:
        raise ConfigError(
            f"max_ongoing_requests={config.max_ongoing_requests} is below max_batch_size={config.max_batch_size}, "
            "so batches would never fill; raise the one or lower the other"
        )
    token = os.environ.get(config.token_env, "")
    if not token and not is_loopback(config.host):
        raise ConfigError(
            f"host={config.host} is open to other machines, and {config.token_env} holds no token; "
            f"set {config.token_env} (e.g. to the output of 'openssl rand -hex 32') or listen on 127.0.0.1"
        )
    _refuse_without_token_mode()
    deployment = serve.deployment(
        name="Reranker",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            **actor_placement(config, config.num_gpus),
        },
    )(serve.ingress()(Reranker))
    # The replicas get the token's hash: a deployment's arguments are readable in the dashboard.
    return deployment.bind(
        config.model_copy(update={"model": name}),
        sha256(token) if token else None,
    )


def _refuse_without_token_mode() -> None:
    if not has_token_mode():
        raise ConfigError(
            "nothing is served in a Ray without token mode (RAY_AUTH_MODE is not 'token'): each replica opens a port "
            "on all addresses of its machine, where anyone could run code. For jobs.serve and jobs.query unset "
            "RAY_AUTH_MODE: they make a token. For 'serve run' and clusters set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
            "(e.g. to the output of 'openssl rand -hex 32') or RAY_AUTH_TOKEN_PATH before Ray starts, on every node"
        )


@contextmanager
def running(config: ServeConfig) -> Iterator[str]:
    """Serve `config` in this driver's Ray session while the block runs; yields the address to send requests to.

    Raises `ConfigError` where the cluster serves something already: that is not ours to stop.
    """
    from ray import serve

    app = application(config)
    served = serve.status().applications
    if served:
        raise ConfigError(f"this Ray cluster already serves {', '.join(served)}; send requests there, or stop it first")
    level = logger.level
    logger.setLevel(logging.WARNING)  # of this driver; the replicas have their own
    port = config.port or _free_port(config.host)
    serve.start(http_options={"host": config.host, "port": port})
    try:
        serve.run(app, name="medmm", route_prefix="/")
        yield f"http://{config.host}:{port}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        logger.setLevel(level)


def _free_port(host: str) -> int:
    # Serve takes a number, not a socket: another process may take the port before it does, which Serve then reports.
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
