"""Serve configs: a file of its own, and what a RayService carries as text."""

import importlib
import os
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from cluster.lint.project import Project, Rule, YamlFile, with_options
from medmm_ray.config import ConfigError, build
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.deployment import build_app
from medmm_ray.service.guard import is_loopback


def configs_of(project: Project) -> list[YamlFile]:
    """The Serve configs, each as the file that it lies in."""
    configs = with_options(project.cluster / "serve" / "config.yaml")
    for file in project.manifests:
        for document in file.documents:
            if document["kind"] == "RayService":
                configs.append(YamlFile(file.path, document["spec"]["serveConfigV2"], file.has_options))
    return configs


def arguments_of(file: YamlFile) -> dict[str, Any]:
    """The arguments of the application."""
    (application,) = file.documents[0]["applications"]
    return dict(application["args"])


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    if get_origin(annotation) in (Union, UnionType, list):
        return [model for part in get_args(annotation) for model in models_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def unknown_keys(model: type[BaseModel], values: Any, where: str = "") -> list[str]:
    """The keys, dotted, that a model does not name."""
    if isinstance(values, list):
        return [key for place, value in enumerate(values) for key in unknown_keys(model, value, f"{where}{place}.")]
    keys = [f"{where}{key}" for key in values if key not in model.model_fields]
    for name, info in model.model_fields.items():
        for inner in models_of(info.annotation):
            if isinstance(values.get(name), dict | list):
                keys += unknown_keys(inner, values[name], f"{where}{name}.")
    return keys


# Rules


def names_what_serve_knows(file: YamlFile, _: Project) -> Iterator[str]:
    """Every key is one of Serve's, which itself passes over misspelt ones in silence."""
    from ray.serve.schema import ServeDeploySchema

    for key in unknown_keys(ServeDeploySchema, file.documents[0]):
        yield f"{key} is no key of Serve's"
    try:
        ServeDeploySchema.model_validate(file.documents[0])
    except ValueError as error:
        yield str(error).splitlines()[0]


def builds_our_application(file: YamlFile, _: Project) -> Iterator[str]:
    """The import path is the application's builder, which takes the arguments."""
    (application,) = file.documents[0]["applications"]
    module, _colon, attribute = application["import_path"].partition(":")
    try:
        builder = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        builder = None
        yield str(error)
    if builder is not build_app:
        yield f"{application['import_path']} is not medmm_ray.serve:build_app"
    try:
        build(ServeConfig, arguments_of(file), "args")
    except ConfigError as error:
        yield str(error)


SCALING = (
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "target_wait_s",
    "upscale_delay_s",
    "downscale_delay_s",
)


def says_how_it_scales(file: YamlFile, project: Project) -> Iterator[str]:
    """Bounds, targets and delays of the number of replicas stand in the file, and the cluster has room for the most."""
    arguments = arguments_of(file)
    for name in SCALING:
        if name not in arguments:
            yield f"{name} is not set: a reader shall see how the number of replicas follows the load"
    try:
        config = build(ServeConfig, arguments, "args")
    except ConfigError:
        return  # said by the rule above
    for manifest in project.manifests:
        if manifest.path == file.path and manifest.has_options == file.has_options:
            most = _most_workers(manifest)
            needed = sum((model.max_replicas or model.num_replicas) * model.num_gpus for model in _models(config))
            if needed > most:
                yield f"max_replicas of all models need {needed:g} GPUs; workers have {most:g}"


def _models(config: ServeConfig) -> list[ModelConfig]:
    """The first model and the further ones."""
    return [config, *config.models.values()]


def _most_workers(manifest: YamlFile) -> float:
    """GPUs of all workers that a RayService may have."""
    total = 0.0
    for document in manifest.documents:
        if document["kind"] != "RayService":
            continue
        for group in document["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            total += group["maxReplicas"] * float(limits.get("nvidia.com/gpu", 0))
    return total


def listens_where_it_says(file: YamlFile, project: Project) -> Iterator[str]:
    """Serve's host is the application's; one that is open to others gets its token from a secret that must be there."""
    host, said = file.documents[0].get("http_options", {}).get("host"), arguments_of(file).get("host")
    if host != said:
        yield f"http_options.host is {host}, the application's {said}; Serve's own default is 0.0.0.0"
    variable = ServeConfig.model_fields["token_env"].default
    if not is_loopback(str(host)):
        texts = [manifest.text for manifest in project.manifests if manifest.path == file.path]
        if not texts or not re.search(rf"name: {variable}\s+valueFrom:\s+secretKeyRef", texts[0]):
            yield f"host {host} is open, and no secret holds {variable}"


def serves_what_a_run_makes(file: YamlFile, project: Project) -> Iterator[str]:
    """Each model is a result's stable name in a run that one of the files makes."""
    from jobs.graph import MAKER

    arguments = arguments_of(file)
    runs = {made for text in project.texts.values() for made in re.findall(r"run=([\w:/.-]+)", text)}
    for model in [arguments, *arguments.get("models", {}).values()]:
        run, _slash, name = str(model.get("model")).removesuffix("/latest").rpartition("/")
        if name not in ("two_tower", "text_prm") or MAKER[name].makes[name] is not None:
            yield f"model ends with {name!r}, expected <run>/two_tower or <run>/text_prm"
        if run not in runs:
            yield f"model lies in {run}, and the files make {', '.join(sorted(runs))}"


def agrees_with_the_other(file: YamlFile, project: Project) -> Iterator[str]:
    """The Serve configs differ in where they listen, and to whom, alone."""
    first = next(config for config in configs_of(project) if config.has_options == file.has_options)
    if _without_hosts(file) != _without_hosts(first):
        yield f"differs from {os.path.relpath(first.path, project.root)} in more than the hosts"


def _without_hosts(file: YamlFile) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(file.text)
    config.pop("proxy_location", None)
    config.get("http_options", {}).pop("host", None)
    config["applications"][0]["args"].pop("host", None)
    config["applications"][0]["args"].pop("access", None)  # it goes with the host
    return config


RULES: tuple[Rule[YamlFile], ...] = (
    names_what_serve_knows,
    builds_our_application,
    says_how_it_scales,
    listens_where_it_says,
    serves_what_a_run_makes,
    agrees_with_the_other,
)
