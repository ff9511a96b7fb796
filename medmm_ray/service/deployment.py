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

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from medmm_ray.config import ConfigError, build, parse_overrides
from medmm_ray.data.tables import follow
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.placement import actor_placement
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend
from medmm_ray.service.batch_metrics import BatchCollector
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.evidence import EvidenceQuery, EvidenceSource, Found
from medmm_ray.service.guard import is_loopback
from medmm_ray.service.handles import answer_of
from medmm_ray.service.keys import Key, Keyring, sha256
from medmm_ray.service.load import replica_options
from medmm_ray.service.metrics import EXPORTED, Increases, ServiceMetrics
from medmm_ray.service.models import FurtherModel, LoadReports, ModelReplica, Models, without_references
from medmm_ray.service.policy import connect_policy, policy_deployment
from medmm_ray.service.quotas import Quotas
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.replica import Load, load_model
from medmm_ray.service.retrieval import EvidenceSearch, RetrievalConfig
from medmm_ray.session import has_token_mode

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file


class Reranker(LoadReports):
    """One replica: loads the first model, and scores what comes on one thread; further models are asked."""

    def __init__(
        self,
        config: ServeConfig,
        fixed_keys: Sequence[Key] = (),
        load: Load = load_model,
        evidence: "DeploymentHandle[EvidenceSearch] | None" = None,
        policy: Any = None,
        further: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse_without_token_mode()  # a cluster's mode may differ from the driver's; this process opens the port
        model = load(config)
        scorer = model.scorer
        super().__init__(scorer)
        readiness = Readiness(model.tiny_log_odds, scorer.stuck)
        metrics = ServiceMetrics(_ray_counters())
        metrics.registry.register(BatchCollector(scorer))
        backend = Backend(
            scorer.score,
            config if model.takes_references else without_references(config),
            model.traits,
            readiness,
            fingerprint=model.fingerprint,
            evidence=_source(evidence),
            metrics=metrics,
            check=scorer.check,
            policy=connect_policy(config.policy, policy),
            map_tiles=model.map_tiles,
        )
        models = Models(backend, config, {name: FurtherModel(handle) for name, handle in (further or {}).items()})
        self._app = api(models, keyring_of(config, fixed_keys), Quotas(_num_replicas), scorer.tracer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def build_app(args: Mapping[str, Any]) -> "serve.Application":
    """The Serve application; `args`: fields of `ServeConfig`, as text (``serve run``) or values (a config file)."""
    words = [f"{name}={value}" for name, value in args.items() if isinstance(value, str)]
    values = {name: value for name, value in args.items() if not isinstance(value, str)} | parse_overrides(words)
    return application(build(ServeConfig, values, "serve"))


def checkpoint_of(name: str) -> str:
    """The checkpoint that `name` stands for: of a run its newest complete one, two towers before the text alone.

    A checkpoint, a stable name, or a hub id is what `follow` makes of it.
    """
    # A name that is followed nowhere comes back as it was: then there is no such result.
    for kind in ("two_tower", "text_prm"):
        stable = f"{name.rstrip('/')}/{kind}"
        if (checkpoint := follow(stable)) != stable:
            return checkpoint
    return follow(name)


def application(config: ServeConfig, load: Load = load_model) -> "serve.Application":
    """The deployment of `config`.

    Raises `ConfigError` where it cannot be served, or would be open to anyone: without a key, unless it answers
    loopback alone, or in a Ray without token mode.
    """
    from ray import serve

    if config.model is None:
        raise ConfigError("model is not set; name a checkpoint folder: model=runs/quickstart/two_tower")
    config = config.model_copy(update={"model": _fixed_name(config.model)})
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
    models = {}
    further = {}
    for name, model in config.models.items():
        models[name] = model.model_copy(update={"model": _fixed_name(str(model.model))})
        further[name] = _deployment(f"Model-{name}", models[name])(ModelReplica).bind(models[name], load)
    # The first model's replicas keep what they know of the others: new weights of those are to replace these too.
    config = config.model_copy(update={"models": models})
    evidence = None if config.retrieval is None else _evidence_search(config.retrieval)
    reranker = _deployment("Reranker", config)(serve.ingress()(Reranker))
    # The replicas get hashes of keys: a deployment's arguments are readable in the dashboard.
    app: serve.Application = reranker.bind(
        config,
        fixed_keys,
        load,
        evidence=evidence,
        policy=policy_deployment(config.policy),
        further=further,
    )
    return app


def _fixed_name(model: str) -> str:
    """The checkpoint that a name stands for now: a replica may start in another folder, and later, when a run's name
    stands for another result."""
    name = checkpoint_of(model)
    # A URI is copied where it is read, so it stays one.
    return name if "://" in name else resolve(name)


def _deployment(name: str, config: ModelConfig) -> Any:
    """Serve's decorator for the replicas of a model."""
    from ray import serve

    return serve.deployment(
        name=name,
        **replica_options(config),
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            **actor_placement(config, config.num_gpus),
        },
    )


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
        found: Found = await answer_of(search.remote(query))
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
    """Counters that Ray's agents export as ``ray_medmm_<name>``, labelled by replica and model."""
    from ray.serve.metrics import Counter

    return {name: Counter(f"medmm_{name}", what, tag_keys=("model",)) for name, what in EXPORTED.items()}


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
def running(config: ServeConfig, load: Load = load_model) -> Iterator[str]:
    """Serve `config` in this driver's Ray session while the block runs; yields the address to send requests to.

    Raises `ConfigError` where the cluster serves something already: that is not ours to stop.
    """
    from ray import serve

    app = application(config, load)
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
