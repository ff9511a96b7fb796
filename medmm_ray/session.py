"""The one Ray session of a driver: a cluster that is there (``RAY_ADDRESS``), or this machine.

Ray's servers run what they are sent, so they ask for a token (Ray's token mode): a session of its own makes one that
nobody else knows, one that joins a cluster shows that cluster's.
"""

import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmm_ray.config import ConfigError

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

LOCAL_LOGICAL_CPUS = 8  # actor stages of one pipeline at one CPU each would deadlock on two cores
LOCAL_OBJECT_STORE_BYTES = 1 << 30
# At the end of Serve and of training an actor is killed; small stages have more processes than a laptop has cores.
HARMLESS = ("killed by `ray.kill`", "PYTHON worker processes have been started")
GRACE_S = 10.0  # for Ray's processes to end by themselves
# What to do where a cluster's token is missing.
HAND_OVER = (
    "export RAY_AUTH_TOKEN_PATH=<file with the cluster's token> (cluster/local/up.sh prints the line for its cluster) "
    "or RAY_AUTH_TOKEN"
)


def worker_environment() -> dict[str, str]:
    """Variables of every worker. One OpenMP thread a process: two that compute beside another process collapse.

    Threads that wait sleep soon, but not at once: on two cores, training on two threads took 26 % longer without the
    short spin, and other processes are not held up by it. oneDNN keeps what it made for a product of each shape, a
    thousand at its default, and rows have thousands of lengths: a replica's memory grew by a third within a minute of
    load. A few dozen serve all layers of a pass, and are no slower.
    """
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",  # the same by PyTorch's own layer over oneDNN
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@contextmanager
def session(quiet: bool = True) -> Iterator[None]:
    """Start Ray, or join the cluster that ``RAY_ADDRESS`` names; shut this driver's session down at the end.

    Inside a session that is open already, it is that one, and stays open. Raises `ConfigError` where the token of the
    cluster to join is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")  # the new file reader makes one block of many files
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Workers in training wait after each epoch and checkpoint until they are looked at: up to 2 s at Ray's default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Keeps the local servers of a session on 127.0.0.1: on Linux, Ray turns that into the machine's outer address.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # At Ray's default of 15 those at work are starved by those that start, which have 0: for a second, on two cores.
    os.environ.setdefault("RAY_worker_niceness", "5")
    # Read by each proxy of Serve's when it starts; a cluster's nodes have it from their own environment.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "medmm_ray.service.proxy:middlewares")
    # Workers that Ray starts ahead have not the variables of `worker_environment`, so that no task ever runs in them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if quiet:
        # Every Ray Data actor that may restart makes the driver's C++ side print an error line; real ones reach Python.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if quiet:
        # max_concurrency and max_restarts of an actor have no other way into map_batches at this version of Ray.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    if ray.is_initialized():
        yield
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    with token_of_cluster(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}") if joins else _token_of_session():
        try:
            _start(joins, quiet)
            yield
        finally:  # also after a start that failed: Ray leaves the processes that it had started
            started = [] if joins else _processes()
            ray.shutdown()
            _end(started)


# Ray's token


def has_token_mode() -> bool:
    """Whether Ray's servers in this process answer nobody without the cluster's token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return is_token_auth_enabled()


@contextmanager
def fresh_token() -> Iterator[None]:
    """Token mode with a new random token, for a Ray that this process starts in the block.

    The token is in the environment alone: the processes of that Ray inherit it, other users cannot read it, and a token
    of the user's own (``~/.ray/auth_token``, another cluster's) is neither shown to it nor changed.
    """
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)):
        yield


@contextmanager
def _token_of_session() -> Iterator[None]:
    if _mode() == "disabled":
        log.warning(
            "RAY_AUTH_MODE=disabled: every user of this machine can run code in this session through Ray's ports, "
            "and nothing can be served; unset RAY_AUTH_MODE, and the session makes a token of its own"
        )
        yield
        return
    with fresh_token():
        yield


@contextmanager
def token_of_cluster(address: str) -> Iterator[None]:
    """Token mode where a token is at hand; a cluster that asks for none passes over it.

    Raises `ConfigError`, which names the cluster's `address`, where the environment promises a token and has none.
    """
    mode, path = _mode(), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode == "disabled":
        yield
        return
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not _holds_token(Path(path)):
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH={path} is no file with a token (a local cluster's goes with it); "
            f"for the cluster at {address}, {HAND_OVER}"
        )
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    if AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        with _environment(RAY_AUTH_MODE="token"):
            yield
    elif mode == "token":
        raise ConfigError(f"RAY_AUTH_MODE=token, and no token for the cluster at {address}; {HAND_OVER}")
    else:
        yield


def _mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def _holds_token(path: Path) -> bool:
    return path.is_file() and bool(path.read_text().strip())


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set `variables` in the block; Ray reads mode and token once, so it must read them again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    def _reread() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _reread()
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread()


# The session


def _start(joins: bool, quiet: bool) -> None:
    import ray
    from ray._private import ray_constants

    # Read from the environment when Ray is imported, which may have been before this session set it.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] != "0"

    try:
        with _stderr_on_failure() if quiet else nullcontext():
            ray.init(
                address=None
                if joins
                else "local",  # else it joins whatever cluster started here last, or is in its way
                num_cpus=None if joins else max(LOCAL_LOGICAL_CPUS, os.cpu_count() or 1),
                object_store_memory=None if joins else LOCAL_OBJECT_STORE_BYTES,
                include_dashboard=None if joins else False,
                runtime_env={"env_vars": worker_environment()},
                log_to_driver=not quiet,
                logging_level=logging.WARNING,
            )
    except ConnectionError as error:
        if not joins:
            raise
        raise ConfigError(
            f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: nothing answers there, or it "
            f"refuses this driver's token (InvalidAuthToken); {HAND_OVER}"
        ) from error
    if quiet:
        _without_harmless_reports()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = not quiet
    context.print_on_execution_start = False
    # Waiting for spot machines is not a stall, and one failed start (memory) is not the end of a job.
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = 3
    for name in ("ray.data", "ray.train", "ray.tune"):
        # Quiet: an error ends the job, which says it once, in its own words; Ray's logs keep the trace.
        logging.getLogger(name).setLevel(logging.CRITICAL if quiet else logging.INFO)


def _processes() -> "list[psutil.Process]":
    """Ray's processes of this driver: the workers are the raylet's children."""
    import psutil

    servers = []
    workers: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        if process.name() in ("raylet", "gcs_server"):
            servers.append(process)
            workers += process.children(recursive=True)
    return [*servers, *workers]


def _end(processes: "Sequence[psutil.Process]") -> None:
    """Wait for Ray's processes to end, and kill what stays: a worker may hang on its way out and outlive its raylet."""
    import psutil

    _, still_alive = psutil.wait_procs(set(processes), timeout=GRACE_S)
    for process in still_alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _without_harmless_reports() -> None:
    """Keep those reports of Ray's off the screen that `HARMLESS` names."""
    from ray._private import worker

    print_lines = worker.print_to_stdstream

    def _print_unless_harmless(data: dict[str, Any], **options: Any) -> None:
        text = "\n".join(data["lines"])
        if not any(words in text for words in HARMLESS):
            print_lines(data, **options)

    worker.print_to_stdstream = _print_unless_harmless  # type: ignore[assignment]


@contextmanager
def _stderr_on_failure() -> Iterator[None]:
    """Keep back what is written to standard error, also by C++ code (Ray greets there); on a failure it is shown."""
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), 2)
        try:
            yield
        except BaseException:
            errors.seek(0)
            os.write(screen, errors.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)
