"""The files for Kubernetes: what no schema knows, as the operator's rules and what the pipeline needs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.lint import schemas
from cluster.lint.project import Project, Rule, YamlFile
from cluster.lint.schemas import cluster_of, pods_of

LABELS = {"ray.io/accelerator-type", "ray.io/market-type"}
GPU = "nvidia.com/gpu"


def rays_of(file: YamlFile) -> list[dict[str, Any]]:
    """The documents of KubeRay's kinds."""
    return [document for document in file.documents if document["apiVersion"] == "ray.io/v1"]


def containers_of(file: YamlFile) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each container with its pod's spec and its group's name."""
    for document in rays_of(file):
        for name, pod in pods_of(document):
            for container in pod["spec"]["containers"]:
                yield name, pod["spec"], container


def groups_of(file: YamlFile) -> Iterator[dict[str, Any]]:
    """The worker groups."""
    for document in rays_of(file):
        yield from cluster_of(document)["workerGroupSpecs"]


def has_gpu(group: Mapping[str, Any]) -> bool:
    """Whether a group's pods have GPUs."""
    resources = [container["resources"]["limits"] for container in group["template"]["spec"]["containers"]]
    return any(GPU in limits for limits in resources)


def platform_of(project: Project, kind: str) -> list[dict[str, Any]]:
    """The documents of a kind that the manifests stand on."""
    documents = [document for file in project.manifests for document in file.documents]
    return [document for document in documents if document["kind"] == kind]


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector of labels chooses a pod."""
    return dict(selector.get("matchLabels", {})).items() <= labels.items()


# Rules


def is_valid_for_kubernetes(file: YamlFile, _: Project) -> Iterator[str]:
    """KubeRay's schemas (1.5.1 and 1.7.0; options by 1.7.0) and Kubernetes' take the file, to the last field."""
    for document in file.documents:
        yield from schemas.faults(document, schemas.KUBERAY[-1:] if file.has_options else schemas.KUBERAY)


def follows_the_operators_rules(file: YamlFile, _: Project) -> Iterator[str]:
    """Ray's version is the installed one; autoscaler v2, by which pods are never restarted; the token is asked for."""
    import ray

    for document in rays_of(file):
        cluster = cluster_of(document)
        if cluster.get("rayVersion") != ray.__version__:
            yield f"rayVersion is {cluster.get('rayVersion')}, the lock has {ray.__version__}"
        if cluster.get("authOptions") != {"mode": "token"}:
            yield "authOptions.mode is not token: whoever reaches a port runs code"
        scaling = (cluster.get("enableInTreeAutoscaling"), cluster.get("autoscalerOptions", {}).get("version"))
        if scaling != (True, "v2"):
            yield f"autoscaling is {scaling[0]}, version {scaling[1]}; expected v2, which alone knows labels"
    for name, pod, _container in containers_of(file):
        if pod.get("restartPolicy") != "Never":
            yield f"{name}: restartPolicy is {pod.get('restartPolicy')}; autoscaler v2 wants Never"


def keeps_the_head_free(file: YamlFile, _: Project) -> Iterator[str]:
    """The head runs no work; a RayJob's driver asks for a CPU, and so runs elsewhere."""
    for document in rays_of(file):
        if cluster_of(document)["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield 'headGroupSpec.rayStartParams lacks num-cpus: "0"'
        if document["kind"] == "RayJob" and not document["spec"].get("entrypointNumCpus"):
            yield "entrypointNumCpus is not set: the driver, which holds tables, would run on the head"


def has_a_cpu_group(file: YamlFile, _: Project) -> Iterator[str]:
    """Work without a GPU has nodes without one: calls of APIs take hours."""
    for document in rays_of(file):
        groups = cluster_of(document)["workerGroupSpecs"]
        if document["kind"] != "RayService" and all(map(has_gpu, groups)):
            yield "every worker group has GPUs"


def spot_has_a_fallback(file: YamlFile, _: Project) -> Iterator[str]:
    """Behind each spot group stands one on demand with the same accelerator."""
    markets: dict[str, list[str]] = {}
    for group in groups_of(file):
        labels = group.get("labels", {})
        markets.setdefault(labels.get("ray.io/accelerator-type", ""), []).append(labels.get("ray.io/market-type", ""))
    for accelerator, kinds in markets.items():
        if "spot" in kinds and "on-demand" not in kinds[kinds.index("spot") :]:
            yield f"{accelerator or 'CPU'} has {', '.join(kinds)}, and nothing where there is no spot node"


def labels_say_what_a_group_is(file: YamlFile, _: Project) -> Iterator[str]:
    """A worker group's labels are Ray's own, stand at the group, and name an accelerator where it has GPUs."""
    for group in groups_of(file):
        labels = group.get("labels", {})
        for label in set(labels) - LABELS:
            yield f"{group['groupName']}: no step asks for the label {label}"
        if labels.get("ray.io/market-type") not in ("spot", "on-demand"):
            yield f"{group['groupName']}: ray.io/market-type is {labels.get('ray.io/market-type')}"
        if has_gpu(group) != ("ray.io/accelerator-type" in labels):
            yield f"{group['groupName']}: ray.io/accelerator-type does not fit its GPUs"
        selector = group["template"]["spec"].get("nodeSelector", {})
        if (labels.get("ray.io/market-type") == "spot") != ("spot" in " ".join(selector)):
            yield f"{group['groupName']}: ray.io/market-type and nodeSelector do not agree"


def has_the_gpus_that_recipes_ask_for(file: YamlFile, project: Project) -> Iterator[str]:
    """A group has each kind of GPU that a shipped recipe asks for: else its steps wait for ever."""
    kinds = {group.get("labels", {}).get("ray.io/accelerator-type") for group in groups_of(file)}
    for kind in sorted(project.accelerators - kinds):
        if rays_of(file):
            yield f"no group has {kind}"


def has_room_to_grow(file: YamlFile, _: Project) -> Iterator[str]:
    """A group's least is below its most, and what a pod asks for is what it may take."""
    for group in groups_of(file):
        if not 0 <= group.get("minReplicas", -1) < group.get("maxReplicas", 0):
            least, most = group.get("minReplicas"), group.get("maxReplicas")
            yield f"{group['groupName']}: minReplicas {least}, maxReplicas {most}"
    for name, _pod, container in containers_of(file):
        resources = container.get("resources", {})
        if not resources.get("limits") or resources.get("requests") != resources.get("limits"):
            yield f"{name}: requests and limits differ: Ray counts the limits"


def runs_the_image_of_its_kind(file: YamlFile, _: Project) -> Iterator[str]:
    """Pods with GPUs run the image for GPUs, the others the one for CPUs (a scorer's head imports the application)."""
    is_service = any(document["kind"] == "RayService" for document in rays_of(file))
    for name, _pod, container in containers_of(file):
        needs_gpu_image = GPU in container.get("resources", {}).get("limits", {}) or (is_service and name == "head")
        kind = "gpu" if needs_gpu_image else "cpu"
        if not container["image"].endswith(f"-{kind}"):
            yield f"{name} runs {container['image']}, expected one that ends with -{kind}"


def tolerates_what_gpu_nodes_are_tainted_with(file: YamlFile, _: Project) -> Iterator[str]:
    """Pods with GPUs tolerate the taint of nodes with GPUs."""
    for group in groups_of(file):
        tolerations = group["template"]["spec"].get("tolerations", [])
        if has_gpu(group) and GPU not in [toleration.get("key") for toleration in tolerations]:
            yield f"{group['groupName']} does not tolerate {GPU}"


def runs_as_nobody_special(file: YamlFile, _: Project) -> Iterator[str]:
    """No container runs as root, gains rights or keeps capabilities; volumes belong to the group that it runs in."""
    for name, pod, container in containers_of(file):
        context, rights = pod.get("securityContext", {}), container.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: the pod's securityContext lacks runAsNonRoot or seccompProfile RuntimeDefault"
        if pod.get("volumes") and not context.get("fsGroup"):
            yield f"{name}: no fsGroup: a fresh claim is root's, and nothing can be written"
        if rights.get("allowPrivilegeEscalation") is not False or rights.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: {container['name']} may gain rights"
        if name != "head" and pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: has a token of Kubernetes' API, which the head's autoscaler alone needs"


def mounts_what_there_is(file: YamlFile, project: Project) -> Iterator[str]:
    """Mounted volumes exist, claims are in platform.yaml and written by many nodes, a run lies in a mounted folder."""
    modes = {
        claim["metadata"]["name"]: claim["spec"]["accessModes"]
        for claim in platform_of(project, "PersistentVolumeClaim")
    }
    for name, pod, container in containers_of(file):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{name} mounts {mount['name']}, which is no volume of its"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and modes.get(claim) != ["ReadWriteMany"]:
                yield f"{name}: the claim {claim} is not in platform.yaml as ReadWriteMany"
    for run in re.findall(r"run=(/\S+)", file.text):
        folder = "/" + run.split("/")[1]
        if "".join(file.text.split()).count(f"mountPath:{folder}") == 0:
            yield f"run={run} lies in no mounted folder: it goes with its pod"


def asks_for_its_secrets(file: YamlFile, _: Project) -> Iterator[str]:
    """Keys come from secrets that must be there, never from the file."""
    for name, _pod, container in containers_of(file):
        references = [entry["secretRef"] for entry in container.get("envFrom", [])]
        for variable in container.get("env", []):
            references += [variable.get("valueFrom", {}).get("secretKeyRef", {})]
            if re.search(r"TOKEN|KEY|SECRET|PASSWORD", variable["name"]) and "value" in variable:
                yield f"{name}: {variable['name']} holds its value in the file"
        if any(reference.get("optional") for reference in references):
            yield f"{name}: an optional secret that is missing shows after hours, at the first call"
        if name == "head" and not any("name" in reference for reference in references):
            yield "the head has no secret: neither the judge's key nor the scorer's token"


def caches_models_for_all_nodes(file: YamlFile, _: Project) -> Iterator[str]:
    """The caches of models lie in a claim that all nodes share."""
    for name, pod, container in containers_of(file):
        if name == "submitter":
            continue
        claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
        folders = [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in claims]
        variables = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
        for variable in ("MEDMM_CACHE", "HF_HOME"):
            if not any(variables.get(variable, "").startswith(f"{folder}/") for folder in folders):
                yield f"{name}: {variable}={variables.get(variable, '')} lies in no claim"


def is_guarded_by_policies(file: YamlFile, project: Project) -> Iterator[str]:
    """Every pod is under a network policy that denies all, and every head and scorer under a disruption budget."""
    policies, budgets = platform_of(project, "NetworkPolicy"), platform_of(project, "PodDisruptionBudget")
    denying = [policy["spec"] for policy in policies if not {"ingress", "egress"} & set(policy["spec"])]
    for document in rays_of(file):
        for name, pod in pods_of(document):
            labels = dict(pod.get("metadata", {}).get("labels", {}))
            both = [spec for spec in denying if set(spec["policyTypes"]) == {"Ingress", "Egress"}]
            if not any(matches(spec["podSelector"], labels) for spec in both):
                yield f"{name}: no policy denies what is not allowed"
            role = "head" if name == "head" else "worker"
            labels["ray.io/node-type"] = role
            needs_budget = role == "head" or document["kind"] == "RayService"
            if needs_budget and not any(matches(budget["spec"]["selector"], labels) for budget in budgets):
                yield f"{name}: no PodDisruptionBudget: a node that is emptied takes it along"
    for budget in file.documents:
        if budget["kind"] == "PodDisruptionBudget" and not isinstance(budget["spec"].get("minAvailable"), int):
            yield f"{budget['metadata']['name']}: of pods that the operator owns only a whole minAvailable works"


def is_ready_when_it_answers(file: YamlFile, _: Project) -> Iterator[str]:
    """A scorer's pod gets requests when the application answers on it."""
    for document in rays_of(file):
        if document["kind"] != "RayService":
            continue
        port = yaml.safe_load(document["spec"]["serveConfigV2"])["http_options"]["port"]
        for name, pod in pods_of(document):
            for container in pod["spec"]["containers"]:
                probe = " ".join(container.get("readinessProbe", {}).get("exec", {}).get("command", []))
                if name != "head" and f":{port}/ready" not in probe:
                    yield f"{name}: readinessProbe does not ask the application's /ready at port {port}"


def ends_and_can_be_tried_again(file: YamlFile, _: Project) -> Iterator[str]:
    """A RayJob is tried again, ends at some time, and its cluster goes."""
    for document in rays_of(file):
        if document["kind"] != "RayJob":
            continue
        for setting in ("backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"):
            if not document["spec"].get(setting):
                yield f"{setting} is {document['spec'].get(setting)}"


RULES: tuple[Rule[YamlFile], ...] = (
    is_valid_for_kubernetes,
    follows_the_operators_rules,
    keeps_the_head_free,
    has_a_cpu_group,
    spot_has_a_fallback,
    labels_say_what_a_group_is,
    has_the_gpus_that_recipes_ask_for,
    has_room_to_grow,
    runs_the_image_of_its_kind,
    tolerates_what_gpu_nodes_are_tainted_with,
    runs_as_nobody_special,
    mounts_what_there_is,
    asks_for_its_secrets,
    caches_models_for_all_nodes,
    is_guarded_by_policies,
    is_ready_when_it_answers,
    ends_and_can_be_tried_again,
)
