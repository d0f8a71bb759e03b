"""Kubeflow Trainer v2: a TrainJob and the TrainingRuntime that it refers to, with a ConfigMap.

The runtime is the job's own, so that nothing has to be installed in the cluster beforehand. Trainer's
torch policy tells pods their number and the address of node 0 in PET_* variables.
"""

from launch.cluster.kubernetes import job_spec
from launch.cluster.pods import Manifest, config_map, metadata, pod_spec, to_text
from launch.cluster.spec import LaunchSpec

_API = "trainer.kubeflow.org"
_VERSION = f"{_API}/v1alpha1"
_ANCESTOR = f"{_API}/trainjob-ancestor-step"
"""Label of the replicated job whose pods are the nodes of the trainer."""


def render(spec: LaunchSpec) -> str:
    """The manifests of the job."""
    return to_text(spec, config_map(spec), _runtime(spec), _train_job(spec))


def _runtime(spec: LaunchSpec) -> Manifest:
    pod = pod_spec(spec, "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)")
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {_ANCESTOR: "trainer"}},
            "spec": job_spec(spec, pod),
        },
    }
    return {
        "apiVersion": _VERSION,
        "kind": "TrainingRuntime",
        "metadata": {**metadata(spec), "labels": {f"{_API}/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": spec.nodes, "torch": {}},
            "template": {"spec": {"replicatedJobs": [job]}},
        },
    }


def _train_job(spec: LaunchSpec) -> Manifest:
    return {
        "apiVersion": _VERSION,
        "kind": "TrainJob",
        "metadata": metadata(spec),
        "spec": {
            "runtimeRef": {"apiGroup": _API, "kind": "TrainingRuntime", "name": spec.name},
            "trainer": {"numNodes": spec.nodes, "numProcPerNode": spec.ranks_per_node},
        },
    }
