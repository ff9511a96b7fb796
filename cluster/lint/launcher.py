"""The files of Ray's cluster launcher (EC2, Compute Engine).

Ray's own schema leaves `provider` and `node_config` open, and says nothing of what a cluster needs to work.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from cluster.lint.project import Project, Rule, YamlFile

PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "project_id"}
# What of Compute Engine's Instance is used here.
GCP_KEYS = {
    "": {"machineType", "serviceAccounts", "disks", "scheduling", "metadata", "networkInterfaces", "labels"},
    "serviceAccounts": {"email", "scopes"},
    "disks": {"boot", "autoDelete", "type", "initializeParams"},
    "initializeParams": {"diskSizeGb", "sourceImage"},
    "scheduling": {"provisioningModel", "instanceTerminationAction", "onHostMaintenance"},
}
# What a machine has: CPUs, GPUs.
MACHINES = {
    "m6i.8xlarge": (32, 0),
    "p4d.24xlarge": (96, 8),
    "n2-standard-32": (32, 0),
    "a2-highgpu-4g": (48, 4),
}
DRIVER = 580  # the least that runs the CUDA 13 wheels
AWS_IMAGE = re.compile(
    r"ami-[0-9a-f]{17}|resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-.*"
)
GCP_IMAGE = re.compile(r"projects/deeplearning-platform-release/global/images/family/.*-nvidia-(?P<driver>\d+)")

Node = Mapping[str, Any]


def nodes_of(file: YamlFile) -> dict[str, Node]:
    """The node types by name."""
    return dict(file.documents[0]["available_node_types"])


def workers_of(file: YamlFile) -> dict[str, Node]:
    """The node types but the head's."""
    return {name: node for name, node in nodes_of(file).items() if name != file.documents[0]["head_node_type"]}


def num_gpus(node: Node) -> int:
    """GPUs of a node."""
    return int(node["resources"].get("GPU", 0))


def is_spot(node: Node) -> bool:
    """Whether a node is rented until somebody bids more."""
    config = node["node_config"]
    options = (config.get("InstanceMarketOptions", {}), config.get("scheduling", {}))
    return any("spot" in map(str.lower, map(str, option.values())) for option in options)


def image_of(node: Node) -> str:
    """The machine image of a node; empty where it names none."""
    config = node["node_config"]
    disks = config.get("disks") or [{}]
    return str(config.get("ImageId") or disks[0].get("initializeParams", {}).get("sourceImage", ""))


def identity_of(node: Node) -> str:
    """The account that a node acts as; empty where it names none."""
    config = node["node_config"]
    accounts = config.get("serviceAccounts") or [{}]
    return str(config.get("IamInstanceProfile", {}).get("Name") or accounts[0].get("email", ""))


def option(file: YamlFile, flag: str) -> list[str]:
    """The values of an option of `docker run`."""
    options = file.documents[0]["docker"]["run_options"]
    return [words.removeprefix(f"--{flag} ") for words in options if words.startswith(f"--{flag} ")]


# Rules


def is_valid_for_this_ray(file: YamlFile, _: Project) -> Iterator[str]:
    """The installed Ray accepts the file."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(file.documents[0]))
    except Exception as error:  # noqa: BLE001 - whatever it raises is why `ray up` would not start
        yield str(error).splitlines()[0]


def knows_the_providers_keys(file: YamlFile, _: Project) -> Iterator[str]:
    """`provider` and `node_config` hold keys that the cloud's API knows; Ray's schema leaves both open."""
    config = file.documents[0]
    for key in set(config["provider"]) - PROVIDER_KEYS:
        yield f"provider.{key} is none of {', '.join(sorted(PROVIDER_KEYS))}"
    for name, node in nodes_of(file).items():
        faults = _ec2_faults if config["provider"]["type"] == "aws" else _gcp_faults
        for fault in faults(node["node_config"]):
            yield f"{name}: {fault}"


@cache
def _ec2_shape() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _ec2_faults(config: Mapping[str, Any]) -> Iterator[str]:
    from botocore.validate import ParamValidator

    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **config}, _ec2_shape())
    if report.has_errors():
        yield from str(report.generate_report()).splitlines()


def _gcp_faults(config: Any, name: str = "") -> Iterator[str]:
    entries = config if isinstance(config, list) else [config]
    for entry in entries:
        for key, value in entry.items():
            if key not in GCP_KEYS[name]:
                yield f"{name or 'node_config'}.{key} is none of {', '.join(sorted(GCP_KEYS[name]))}"
            elif key in GCP_KEYS:
                yield from _gcp_faults(value, key)


def gives_every_node_an_identity(file: YamlFile, _: Project) -> Iterator[str]:
    """Every node acts as an account, workers not as the head's: by itself Ray gives one to the head alone."""
    head = identity_of(nodes_of(file)[file.documents[0]["head_node_type"]])
    for name, node in nodes_of(file).items():
        if not identity_of(node):
            yield f"{name} has none, so it can write no table to the bucket"
    for name, node in workers_of(file).items():
        if identity_of(node) and identity_of(node) == head:
            yield f"{name} acts as the head ({head}), which may start machines"


def names_a_present_image(file: YamlFile, _: Project) -> Iterator[str]:
    """Every node names a machine image with Docker and a driver that runs CUDA 13; Ray's default is Ubuntu 18.04."""
    for name, node in nodes_of(file).items():
        image = image_of(node)
        google = GCP_IMAGE.fullmatch(image)
        if not image:
            yield f"{name} names none"
        elif not AWS_IMAGE.fullmatch(image) and not google:
            yield f"{name}: {image} is no image that is known to have NVIDIA's driver"
        elif google and int(google["driver"]) < DRIVER:
            yield f"{name}: {image} has driver {google['driver']}, {DRIVER} or newer is needed"


def awaits_the_driver(file: YamlFile, _: Project) -> Iterator[str]:
    """A machine with GPUs waits for its driver before its container starts, and ends where it is too old."""
    commands = "\n".join(file.documents[0].get("initialization_commands") or [])
    if any(map(num_gpus, nodes_of(file).values())) and not ("nvidia-smi" in commands and f"-ge {DRIVER}" in commands):
        yield f"no initialization command asks nvidia-smi for a driver of {DRIVER} or newer"


def has_a_cpu_group(file: YamlFile, _: Project) -> Iterator[str]:
    """Work without a GPU has machines without one: calls of APIs take hours."""
    groups = [name for name, node in workers_of(file).items() if not num_gpus(node) and node["resources"].get("CPU")]
    if not groups:
        yield "every worker has GPUs"


def starts_from_zero(file: YamlFile, _: Project) -> Iterator[str]:
    """Worker groups start at zero and fit into max_workers together."""
    workers = workers_of(file)
    for name, node in workers.items():
        if node.get("min_workers") != 0 or node.get("max_workers", 0) < 1:
            yield f"{name}: min_workers {node.get('min_workers')}, max_workers {node.get('max_workers')}"
    most = sum(node.get("max_workers", 0) for node in workers.values())
    if most > file.documents[0]["max_workers"]:
        yield f"the groups have up to {most} machines, max_workers is {file.documents[0]['max_workers']}"


def spot_has_a_fallback(file: YamlFile, _: Project) -> Iterator[str]:
    """Each spot group has one on demand of the same machine, and the higher priority."""
    workers = workers_of(file)
    for name, node in workers.items():
        if not is_spot(node):
            continue
        same = [other for other in workers.values() if other["resources"] == node["resources"] and not is_spot(other)]
        if not same:
            yield f"{name} has none with {node['resources']}"
        elif node.get("priority", 0) <= max(other.get("priority", 0) for other in same):
            yield f"{name} comes no earlier than its fallback: give it a priority above"


def labels_say_what_a_group_is(file: YamlFile, _: Project) -> Iterator[str]:
    """A worker group's labels are Ray's own and true: its market, and its accelerator where it has one."""
    for name, node in workers_of(file).items():
        labels = dict(node.get("labels", {}))
        market = "spot" if is_spot(node) else "on-demand"
        if labels.pop("ray.io/market-type", None) != market:
            yield f"{name} is {market}, and its label ray.io/market-type does not say so"
        if bool(labels.pop("ray.io/accelerator-type", None)) != bool(num_gpus(node)):
            yield f"{name} has {num_gpus(node)} GPUs, and ray.io/accelerator-type does not fit"
        for label in labels:
            yield f"{name}: no step asks for the label {label}"


def has_the_gpus_that_recipes_ask_for(file: YamlFile, project: Project) -> Iterator[str]:
    """A group has each kind of GPU that a shipped recipe asks for: else its steps wait for ever."""
    kinds = {node.get("labels", {}).get("ray.io/accelerator-type") for node in workers_of(file).values()}
    for kind in sorted(project.accelerators - kinds):
        yield f"no group has {kind}"


def scales_by_labels(file: YamlFile, _: Project) -> Iterator[str]:
    """Ray's second autoscaler is turned on: the first one passes over label selectors."""
    if "RAY_enable_autoscaler_v2=1" not in option(file, "env"):
        yield "docker.run_options lacks --env RAY_enable_autoscaler_v2=1"


def counts_what_a_machine_has(file: YamlFile, _: Project) -> Iterator[str]:
    """`resources` are those of the machine that is rented."""
    for name, node in workers_of(file).items():
        kind = node["node_config"].get("InstanceType") or node["node_config"].get("machineType")
        resources = (node["resources"].get("CPU"), num_gpus(node))
        if MACHINES.get(kind) != resources:
            yield f"{name}: {kind} has (CPU, GPU) {MACHINES.get(kind, 'unknown here')}, the file says {resources}"


def runs_the_image_of_its_kind(file: YamlFile, _: Project) -> Iterator[str]:
    """Machines with GPUs run the image for GPUs, the others the one for CPUs."""
    docker = file.documents[0]["docker"]
    images = {"head": (docker.get("head_image", ""), "cpu")}
    for name, node in workers_of(file).items():
        image = node.get("docker", {}).get("worker_image", docker.get("worker_image", ""))
        images[name] = (image, "gpu" if num_gpus(node) else "cpu")
    for name, (image, kind) in images.items():
        if not image.endswith(f"-{kind}"):
            yield f"{name} runs {image or 'no image'}, expected one that ends with -{kind}"


def asks_for_the_token(file: YamlFile, _: Project) -> Iterator[str]:
    """Ray's ports ask for a token, and every node is given it."""
    if "RAY_AUTH_MODE=token" not in option(file, "env"):
        yield "docker.run_options lacks --env RAY_AUTH_MODE=token"
    if file.documents[0].get("file_mounts", {}).get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "file_mounts lacks ~/.ray/auth_token"


def hands_over_the_keys(file: YamlFile, _: Project) -> Iterator[str]:
    """Every node's Ray starts with the keys of APIs and hubs in its environment, from a file that is not in here."""
    config = file.documents[0]
    if "~/.medmm_keys" not in config.get("file_mounts", {}):
        yield "file_mounts lacks ~/.medmm_keys"
    for setting in ("head_start_ray_commands", "worker_start_ray_commands"):
        if "set -a; . ~/.medmm_keys; set +a; ray start" not in config[setting][-1]:
            yield f"{setting} starts Ray without reading ~/.medmm_keys"


def keeps_the_head_free(file: YamlFile, _: Project) -> Iterator[str]:
    """The head runs no work, and its dashboard listens on loopback."""
    config = file.documents[0]
    if nodes_of(file)[config["head_node_type"]]["resources"].get("CPU") != 0:
        yield "the head's resources lack CPU: 0"
    if "--dashboard-host=127.0.0.1" not in config["head_start_ray_commands"][-1]:
        yield "the dashboard is open to other machines"


def caches_models_outside_the_container(file: YamlFile, _: Project) -> Iterator[str]:
    """A model is fetched once a machine: the caches lie in a volume that initialization commands make."""
    volumes = dict(volume.split(":") for volume in option(file, "volume"))
    folders = {folder: machine for machine, folder in volumes.items()}
    variables = dict(variable.split("=", 1) for variable in option(file, "env"))
    commands = "\n".join(file.documents[0].get("initialization_commands") or [])
    for name in ("MEDMM_CACHE", "HF_HOME"):
        volume = next((folders[folder] for folder in folders if variables.get(name, "").startswith(f"{folder}/")), None)
        if volume is None or volume not in commands:
            yield f"{name}={variables.get(name, '')} lies in no volume that is made on the machine"


RULES: tuple[Rule[YamlFile], ...] = (
    is_valid_for_this_ray,
    knows_the_providers_keys,
    gives_every_node_an_identity,
    names_a_present_image,
    awaits_the_driver,
    has_a_cpu_group,
    starts_from_zero,
    spot_has_a_fallback,
    labels_say_what_a_group_is,
    has_the_gpus_that_recipes_ask_for,
    scales_by_labels,
    counts_what_a_machine_has,
    runs_the_image_of_its_kind,
    asks_for_the_token,
    hands_over_the_keys,
    keeps_the_head_free,
    caches_models_outside_the_container,
)
