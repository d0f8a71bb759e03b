"""What a cluster has to do for a run, whichever cluster it is: made from a recipe, read by renderers.

No torch.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.options import Platform
from launch.validate import world_size
from train.config import ClusterConfig, RunConfig
from train.recipe import to_yaml

PORT = 29400
"""Where node 0 listens for the other nodes, in a pod of its own."""

_SLACK_SECONDS = 60
"""Slurm looks at the time limit of a job once a minute."""

_ON_SLURM = ("account", "setup")
_ON_PODS = ("image", "volume_claim")


@dataclass(frozen=True, kw_only=True)
class Device:
    """How clusters call an accelerator."""

    gres: str
    """Slurm's generic resource."""
    resource: str
    """Extended resource of the vendor's Kubernetes device plugin."""


_DEVICES = {
    "cuda": Device(gres="gpu", resource="nvidia.com/gpu"),
    "ascend": Device(gres="npu", resource="huawei.com/Ascend910"),
    "cambricon": Device(gres="mlu", resource="cambricon.com/mlu"),
}
"""By `parallel.backend`; the others run on the host's processors."""


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """A job: `launch.node` once on each of `nodes` nodes."""

    name: str
    """Of the job; letters, digits and hyphens."""
    recipe: str
    """Name of the recipe, for people."""
    run_dir: str
    """As the nodes see it, absolute."""
    directory: str
    """Working directory, to which paths of the recipe are relative."""
    nodes: int
    ranks_per_node: int
    device: Device | None
    """Of each rank; None: the host's processors."""
    cluster: ClusterConfig
    """Cores, memory, queue, image and so on, as the recipe says."""
    stop_seconds: int
    """A node needs this long, at most, between a stop request and its end."""
    retries: int
    """Restarts in a row without a new checkpoint, before the job is given up."""
    recipe_text: str
    """The resolved recipe, for nodes that cannot see the place where it was typed."""


def summary(spec: LaunchSpec) -> str:
    """The job in a line, for people."""
    ranks = f"{spec.ranks_per_node} rank{'s' if spec.ranks_per_node > 1 else ''}"
    nodes = f"each of {spec.nodes} nodes" if spec.nodes > 1 else "a node"
    return f"{spec.recipe}: {ranks} on {nodes}. Written by `mneme launch`."


def make_spec(config: RunConfig, run_dir: Path | str, directory: Path | str) -> LaunchSpec:
    """The job that trains a recipe for which `problems` finds nothing."""
    nodes = config.launch.nodes
    return LaunchSpec(
        name=re.sub(r"[^a-z0-9-]+", "-", Path(run_dir).name.lower()).strip("-"),
        recipe=config.name,
        run_dir=str(run_dir),
        directory=str(directory),
        nodes=nodes,
        ranks_per_node=world_size(config) // nodes,
        device=_DEVICES.get(config.parallel.backend),
        cluster=config.cluster,
        stop_seconds=math.ceil(config.launch.stop_deadline_seconds) + _SLACK_SECONDS,
        retries=config.launch.max_restarts_without_progress,
        recipe_text=to_yaml(config),
    )


def problems(config: RunConfig, platform: Platform) -> Iterator[str]:
    """Why a valid recipe cannot be given to a cluster, `path=value: rule; what to type instead`."""
    cluster, nodes, backend = config.cluster, config.launch.nodes, config.parallel.backend
    world = world_size(config)
    if backend in ("auto", "dry"):
        yield (
            f"parallel.backend={backend}: the cluster must be asked for devices by name; use "
            f"parallel.backend={', '.join(_DEVICES)} or cpu"
        )
    if backend in _DEVICES and world // nodes > cluster.accelerators_per_node:
        fits = [n for n in range(1, world + 1) if not world % n]
        enough = next(n for n in fits if world // n <= cluster.accelerators_per_node)
        yield (
            f"launch.nodes={nodes}: leaves {world // nodes} ranks on a node, which has "
            f"cluster.accelerators_per_node={cluster.accelerators_per_node}; use "
            f"launch.nodes={enough}"
        )
    if platform == "slurm":
        yield from _slurm_problems(config)
    else:
        yield from _pod_problems(cluster, platform)


def ignored(cluster: ClusterConfig, platform: Platform) -> list[str]:
    """Keys of the recipe that have a value and no meaning on this platform."""
    elsewhere = _ON_PODS if platform == "slurm" else _ON_SLURM
    found = [f"cluster.{key}" for key in elsewhere if getattr(cluster, key)]
    if platform in ("k8s", "kubeflow") and cluster.queue:
        found.append("cluster.queue")
    return found


def _slurm_problems(config: RunConfig) -> Iterator[str]:
    if config.cluster.cpus_per_node is None:
        yield (
            "cluster.cpus_per_node=null: Slurm gives a node's task one core if it is not told; type "
            "cluster.cpus_per_node=NUMBER, such as all cores of a node"
        )
    limit = config.cluster.time_limit_minutes
    needed = config.launch.stop_deadline_seconds + _SLACK_SECONDS
    if limit * 60 <= needed:
        yield (
            f"cluster.time_limit_minutes={limit}: saving may take "
            f"launch.stop_deadline_seconds={config.launch.stop_deadline_seconds:g} and Slurm is up "
            f"to a minute late; use cluster.time_limit_minutes={math.floor(needed / 60) + 1} or more"
        )


def _pod_problems(cluster: ClusterConfig, platform: Platform) -> Iterator[str]:
    if cluster.image is None:
        yield (
            f"cluster.image=null: --on {platform} needs the image of a container; build one from "
            "docker/ and type cluster.image=REGISTRY/NAME:TAG"
        )
    if cluster.volume_claim is None:
        yield (
            "cluster.volume_claim=null: pods need a volume that all of them see, with the corpus "
            "and for the runs; type cluster.volume_claim=NAME of a ReadWriteMany claim"
        )
    if not cluster.volume_path.startswith("/"):
        yield f"cluster.volume_path={cluster.volume_path}: must be absolute; for example /data"
