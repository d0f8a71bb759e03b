"""Plain Kubernetes: an Indexed Job, a headless Service by which pods find node 0, a ConfigMap."""

from launch.cluster.pods import (
    CONTAINER,
    FINAL_EXIT_CODES,
    Manifest,
    config_map,
    metadata,
    pod_spec,
    to_text,
)
from launch.cluster.spec import PORT, LaunchSpec
from train.stop import STOPPED_EXIT_CODE

_JOB_LABEL = "batch.kubernetes.io/job-name"
"""Kubernetes puts it on the pods of a Job."""


def render(spec: LaunchSpec) -> str:
    """The manifests of the job."""
    pod = pod_spec(spec, f"{spec.name}-0.{spec.name}:{PORT}") | {"subdomain": spec.name}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(spec),
        "spec": job_spec(spec, pod),
    }
    return to_text(spec, config_map(spec), _service(spec), job)


def job_spec(spec: LaunchSpec, pod: Manifest) -> Manifest:
    """An Indexed Job of all nodes: the index of a pod is the number of its node."""
    return {
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "completionMode": "Indexed",
        # Of nodes that were lost; crashes of ranks are counted by launch.node.
        "backoffLimit": spec.retries * spec.nodes,
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {"spec": pod},
    }


def _failure_rules() -> list[Manifest]:
    """An evicted pod saves and leaves with 85, and so do the others: start all again, uncounted."""

    def after(*codes: int) -> Manifest:
        return {"containerName": CONTAINER, "operator": "In", "values": list(codes)}

    evicted = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "FailJob", "onExitCodes": after(*FINAL_EXIT_CODES)},
        {"action": "Ignore", "onExitCodes": after(STOPPED_EXIT_CODE)},
        {"action": "Ignore", "onPodConditions": [evicted]},
    ]


def _service(spec: LaunchSpec) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(spec),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {_JOB_LABEL: spec.name},
            "ports": [{"name": "nodes", "port": PORT}],
        },
    }
