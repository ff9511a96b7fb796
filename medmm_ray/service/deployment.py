"""The reward model as a Ray Serve application.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32) \\
        serve run medmm_ray.serve:build_app model=runs/quickstart/two_tower num_gpus=1 access=loopback

Enters: a checkpoint folder. Leaves: the routes of `medmm_ray.service.app`. Scores come from `RewardModel.score`, the
function that the `score` step uses, so that online and offline agree.

Every request for data must carry ``Authorization: Bearer <key>``, with the key that the environment variable
`token_env` holds or one of the file `keys`; with ``access=loopback`` nobody needs a key, and only requests that arrive
at this machine's loopback address are answered. Ray's own token mode does not protect the Serve port, but the
replicas' other ports, of which one listens on every address and unpickles what arrives: nothing is served in a Ray
without it.
"""

import asyncio
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from medmm_ray.config import ConfigError, build, digest, parse_overrides
from medmm_ray.data.artifacts import MANIFEST
from medmm_ray.data.tables import follow
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.placement import actor_placement
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.evidence import EvidenceQuery, EvidenceSource, Found
from medmm_ray.service.guard import is_loopback
from medmm_ray.service.keys import Key, Keyring, sha256
from medmm_ray.service.metrics import EXPORTED, Increases, ServiceMetrics
from medmm_ray.service.quotas import Quotas
from medmm_ray.service.readiness import TINY_CASE, Readiness
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored, StepLogOdds
from medmm_ray.service.retrieval import EvidenceSearch, RetrievalConfig
from medmm_ray.session import has_token_mode

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    from medmm_ray.reward_model import RewardModel

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file


class Reranker:
    """One replica: loads the model, collects requests into batches, scores them on one thread."""

    def __init__(
        self,
        config: ServeConfig,
        fixed_keys: Sequence[Key] = (),
        evidence: "DeploymentHandle[EvidenceSearch] | None" = None,
    ) -> None:
        _refuse_without_token_mode()  # a cluster's mode may differ from the driver's; this process opens the port
        # Here, not above: a driver that starts the replicas needs no torch.
        from ray import serve

        from medmm_ray.reward_model import RewardModel

        folder = resolve(str(config.model))
        model = RewardModel.from_pretrained(
            folder,
            dtype=config.dtype,
            device=config.device,
        )

        @serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_timeout_s)
        async def score(inputs: list[ModelInput]) -> list[Sequence[StepLogOdds]]:
            """Serve gives the inputs that came within the wait as a list, and each caller its own entry."""
            # In a thread, so that the replica reads the next requests while a batch is scored.
            return await asyncio.to_thread(score_inputs, model, inputs, config.token_budget)

        async def scored(model_input: ModelInput) -> Scored:
            """One case's scores, from the batch that it came into."""
            return Scored(await score(model_input))

        # The offline function itself says what the served one must answer; a model that cannot score serves nothing.
        (tiny,) = model.score(TINY_CASE.question, list(TINY_CASE.solutions))
        if tiny.error is not None:
            raise ConfigError(f"{config.model} cannot score a tiny case: {tiny.error}")
        if model.vision is not None:
            config = config.model_copy(update={"max_reference_images": 0})  # it knows a question's own images alone
        # What it was trained on is known here alone: the driver never reads the checkpoint.
        traits = ModelTraits(model.reads_images, **asdict(model.trained_inputs))
        readiness = Readiness(tiny.log_odds)
        metrics = ServiceMetrics(_ray_counters())
        backend = Backend(
            scored,
            config,
            traits,
            readiness,
            fingerprint=fingerprint_of(folder),
            evidence=_source(evidence),
            metrics=metrics,
        )
        self._app = api(backend, keyring_of(config, fixed_keys), Quotas(_num_replicas))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def fingerprint_of(folder: str) -> str:
    """What a checkpoint is named by: the fingerprint of its manifest, else a hash of its files' names and sizes."""
    root = Path(folder)
    manifest = root / MANIFEST
    if manifest.is_file():
        return str(json.loads(manifest.read_text())["fingerprint"])
    # A hub's id, which its revision pins, has no files here.
    files = sorted(root.rglob("*")) if root.is_dir() else []
    sizes = [(str(file.relative_to(root)), file.stat().st_size) for file in files if file.is_file()]
    return digest(sizes or folder)


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
    return application(build(ServeConfig, values, "serve"))


def application(config: ServeConfig) -> "serve.Application":
    """The deployment of `config`.

    Raises `ConfigError` where it cannot be served, or would be open to anyone: without a key, unless it answers
    loopback alone, or in a Ray without token mode.
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
    fixed_keys = _keys_of_environment(config)
    if config.access == "keys" and not fixed_keys and config.keys is None:
        raise ConfigError(
            f"there is no key: set {config.token_env} (e.g. to the output of 'openssl rand -hex 32'), or keys=<file> "
            "(python -m jobs.keys makes one); or, for this machine alone, access=loopback"
        )
    if config.access == "loopback" and not is_loopback(config.host):
        raise ConfigError(
            f"host={config.host} is open to other machines, and access=loopback asks nobody for a key; "
            "set access=keys, or listen on 127.0.0.1"
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
    # The replicas get hashes: a deployment's arguments are readable in the dashboard.
    config = config.model_copy(update={"model": name})
    if config.retrieval is None:
        return deployment.bind(config, fixed_keys)
    return deployment.bind(config, fixed_keys, _evidence_search(config.retrieval))


def _evidence_search(config: RetrievalConfig) -> "serve.Application":
    """The deployment that the scorer's replicas ask for evidence."""
    from ray import serve

    deployment = serve.deployment(
        name="EvidenceSearch",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.num_cpus},
    )(EvidenceSearch)
    return deployment.bind(config)


def _source(handle: "DeploymentHandle[EvidenceSearch] | None") -> EvidenceSource | None:
    if handle is None:
        return None
    search = handle.find

    async def find(query: EvidenceQuery) -> Found:
        """What the deployment finds."""
        found: Found = await search.remote(query)
        return found

    return find


def _keys_of_environment(config: ServeConfig) -> tuple[Key, ...]:
    """The one key that the environment holds, if it does."""
    token = os.environ.get(config.token_env, "")
    if not token or config.access == "loopback":
        return ()
    return (Key(name=config.token_env, sha256=sha256(token), scopes=("admin",)),)


def keyring_of(config: ServeConfig, fixed_keys: Sequence[Key]) -> Keyring | None:
    """The keys of a replica; None where nobody needs one. Raises where the file of keys cannot be read."""
    if config.access == "loopback":
        return None
    return Keyring(fixed_keys, Path(config.keys) if config.keys else None)


def _ray_counters() -> dict[str, Increases]:
    """Counters that Ray's agents export as ``ray_medmm_<name>``, labelled by replica."""
    from ray.serve.metrics import Counter

    return {name: Counter(f"medmm_{name}", "Of the scorer; see GET /metrics.") for name in EXPORTED}


def _num_replicas() -> int:
    """Among how many replicas requests are spread now."""
    from ray import serve

    return max(1, serve.get_replica_context().world_size)


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
