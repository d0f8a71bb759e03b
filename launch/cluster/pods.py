"""What Kubernetes, Kubeflow and Volcano have in common: the pod that is a node, and its recipe.

The recipe travels in a ConfigMap, for the place where `mneme launch` is typed need not see the
volume; node 0 writes it into the run directory.
"""

from typing import Any

import yaml

from launch.cluster.spec import LaunchSpec, summary
from train.stop import ALARM_EXIT_CODE, WRONG_INPUT_EXIT_CODE

Manifest = dict[str, Any]

CONTAINER = "node"
FINAL_EXIT_CODES = [1, WRONG_INPUT_EXIT_CODE, ALARM_EXIT_CODE]
"""After these a person has to look; after any other a pod is started again."""

_RECIPE_DIRECTORY = "/etc/mneme"


def to_text(spec: LaunchSpec, *manifests: Manifest) -> str:
    """All manifests of a job as one YAML file for `kubectl apply -f`."""
    head = f"# {summary(spec)}\n# The run: {spec.run_dir}\n"
    return head + yaml.safe_dump_all(manifests, sort_keys=False, width=100)


def metadata(spec: LaunchSpec) -> Manifest:
    """Name and namespace."""
    return {"name": spec.name, "namespace": spec.cluster.namespace}


def config_map(spec: LaunchSpec) -> Manifest:
    """The recipe as a file."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(spec),
        "data": {"recipe.yaml": spec.recipe_text},
    }


def pod_spec(spec: LaunchSpec, endpoint: str) -> Manifest:
    """The pod of a node, which finds its number in its environment.

    Args:
        spec: the job.
        endpoint: HOST:PORT of node 0; may hold $(VARIABLE) of the pod.
    """
    claim = {"claimName": spec.cluster.volume_claim}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.stop_seconds,
        "containers": [_container(spec, endpoint)],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": claim},
            {"name": "recipe", "configMap": {"name": spec.name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _container(spec: LaunchSpec, endpoint: str) -> Manifest:
    env = {**spec.cluster.env, "PYTHONSAFEPATH": "1"}
    return {
        "name": CONTAINER,
        "image": spec.cluster.image,
        "workingDir": spec.directory,
        # Not `command`, which would go past the entry point of the image: Ascend's finds CANN.
        "args": [
            *("python", "-m", "launch.node", spec.run_dir),
            f"--recipe={_RECIPE_DIRECTORY}/recipe.yaml",
            f"--endpoint={endpoint}",
        ],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "resources": _resources(spec),
        "volumeMounts": [
            {"name": "data", "mountPath": spec.cluster.volume_path},
            {"name": "recipe", "mountPath": _RECIPE_DIRECTORY, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }


def _resources(spec: LaunchSpec) -> Manifest:
    amounts: dict[str, str] = {}
    if spec.cluster.cpus_per_node:
        amounts["cpu"] = str(spec.cluster.cpus_per_node)
    if spec.cluster.memory_gib_per_node:
        amounts["memory"] = f"{spec.cluster.memory_gib_per_node}Gi"
    if spec.device:
        amounts[spec.device.resource] = str(spec.ranks_per_node)
    return {"requests": dict(amounts), "limits": dict(amounts)} if amounts else {}
