"""Volcano: a Job that is scheduled as a whole (gang), with a ConfigMap.

Its plugins give pods a number (`env`: VC_TASK_INDEX) and stable names (`svc`).
"""

from launch.cluster.pods import FINAL_EXIT_CODES, Manifest, config_map, metadata, pod_spec, to_text
from launch.cluster.spec import PORT, LaunchSpec
from train.stop import STOPPED_EXIT_CODE

_TASK = "node"


def render(spec: LaunchSpec) -> str:
    """The manifests of the job."""
    return to_text(spec, config_map(spec), _job(spec))


def _job(spec: LaunchSpec) -> Manifest:
    pod = pod_spec(spec, f"{spec.name}-{_TASK}-0.{spec.name}:{PORT}")
    task = {"name": _TASK, "replicas": spec.nodes, "template": {"spec": pod}}
    job = {
        "minAvailable": spec.nodes,
        "schedulerName": "volcano",
        "plugins": {"env": [], "svc": []},
        "policies": _policies(),
        "maxRetry": spec.retries,
        "tasks": [task],
    }
    if spec.cluster.queue:
        job["queue"] = spec.cluster.queue
    return {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": metadata(spec),
        "spec": job,
    }


def _policies() -> list[Manifest]:
    """The first that fits decides, so exit codes come before any failure at all."""
    return [
        *({"exitCode": code, "action": "AbortJob"} for code in FINAL_EXIT_CODES),
        {"exitCode": STOPPED_EXIT_CODE, "action": "RestartJob"},
        {"event": "PodEvicted", "action": "RestartJob"},
        {"event": "PodFailed", "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
