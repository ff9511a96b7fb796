"""Whether Kubernetes would take a document: KubeRay's own kinds by its schemas, everything else by Kubernetes'.

Strictly: a field that no schema names is a fault, which the API server would drop in silence.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

KUBERAY = ("1.5.1", "1.7.0")  # the least that the files need, and the newest
KUBERNETES = ("1.31", "1.37")


@cache
def kuberay_schemas(version: str) -> dict[str, Any]:
    """The schemas of a release of KubeRay by kind, unknown fields refused."""
    path = Path(__file__).parent / "crds" / f"kuberay-{version}.json"
    schemas: dict[str, Any] = _strict(json.loads(path.read_text()))
    return schemas


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and isinstance(schema.get("type"), str) and not is_open:
        strict["additionalProperties"] = False
    return strict


def faults(document: Mapping[str, Any], releases: Sequence[str] = KUBERAY) -> Iterator[str]:
    """What the API server would refuse or drop, with one of KubeRay's releases, each with the version that would."""
    if document["apiVersion"] == "ray.io/v1":
        for version in releases:
            for fault in _kuberay_faults(document, version):
                yield f"KubeRay {version}: {fault}"
        for name, pod in pods_of(document):
            for fault in kubernetes_faults({"apiVersion": "v1", "kind": "Pod", **pod}):
                yield f"pod {name}: {fault}"
    else:
        yield from kubernetes_faults(document)


def _kuberay_faults(document: Mapping[str, Any], version: str) -> Iterator[str]:
    schema = kuberay_schemas(version).get(document["kind"])
    if schema is None:
        yield f"{document['kind']} is no kind of its"
        return
    # `metadata` is Kubernetes' own: the schema says only that it is an object.
    rest = {key: value for key, value in document.items() if key != "metadata"}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(rest):
        yield f"{error.json_path.removeprefix('$.')}: {error.message[:200]}"


def kubernetes_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """What a release of Kubernetes says of one of its own kinds."""
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.path))
            yield f"Kubernetes {version}: {where}: {error.message[:200]}"


def cluster_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The Ray cluster that a RayCluster is, or that a RayJob or RayService starts."""
    spec = document["spec"]
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


def pods_of(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each group's pod by the group's name, and that of a RayJob's submitter."""
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]
