"""Writes the schemas beside this file from a clone of KubeRay: ``python -m cluster.lint.crds.vendor CLONE TAG...``.

Of each CustomResourceDefinition the version ``v1`` is kept, without descriptions; what a pod may hold is left to
`kubernetes_validate`, so that a schema is a few kilobytes instead of a megabyte.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

KINDS = ("rayclusters", "rayjobs", "rayservices")
CRD = "helm-chart/kuberay-operator/crds/ray.io_{kind}.yaml"
POD = {"type": "object", "x-pod": True}


def pruned(schema: Any) -> Any:
    """A schema without descriptions, its pod specs replaced by `POD`."""
    if isinstance(schema, list):
        return [pruned(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "containers" in schema.get("properties", {}):
        return POD
    return {key: pruned(value) for key, value in schema.items() if not _is_description(key, value)}


def _is_description(key: str, value: Any) -> bool:
    return key == "description" and isinstance(value, str)


def schemas(clone: str, tag: str) -> dict[str, Any]:
    """The schema of each kind at a tag, by the kind's name."""
    by_kind: dict[str, Any] = {}
    for kind in KINDS:
        show = ["git", "-C", clone, "show", f"{tag}:{CRD.format(kind=kind)}"]
        crd = yaml.safe_load(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
        (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"].pop("status", None)
        by_kind[crd["spec"]["names"]["kind"]] = pruned(schema)
    return by_kind


def main(words: Sequence[str]) -> None:
    """Write ``kuberay-<tag>.json`` for each tag."""
    clone, *tags = words
    for tag in tags:
        path = Path(__file__).with_name(f"kuberay-{tag.removeprefix('v')}.json")
        path.write_text(json.dumps(schemas(clone, tag), sort_keys=True, separators=(",", ":")) + "\n")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
