"""The process groups of a layout as torch device meshes; built once by `train.build`.

All meshes are cut out of one root, because FSDP2 joins the mesh that shards a parameter with the
one on which it already is a DTensor, and can do so only under a common root. Axes of size 1 are
meshes like any other, so nothing downstream has a special case for an absent axis.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import DENSE_AXES, EXPERT_AXES, STAGE_AXES, ParallelLayout
from parallel.torch_compat import flatten_mesh, unflatten_mesh


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Meshes of the groups that this rank belongs to; one-dimensional unless said otherwise."""

    world: DeviceMesh
    dense: DeviceMesh
    """(pp, dp_replicate, dp_shard, cp, tp)."""
    experts: DeviceMesh
    """The same ranks as (expert_pp, expert_edp, expert_ep)."""
    pp: DeviceMesh
    tp: DeviceMesh
    cp: DeviceMesh
    sequence: DeviceMesh
    """Ranks that share sequences: cp x tp."""
    stage: DeviceMesh
    """All ranks of a pipeline stage (one program, many data)."""
    ep: DeviceMesh
    """Ranks that hold different experts."""
    expert_shard: DeviceMesh
    """Ranks over which the parameters of the same experts are sharded: edp. Where there are copies of
    them (`ParallelLayout.expert_replicate`) two-dimensional: (copies, shards), row-major over edp."""
    tensor_shard: DeviceMesh
    """Ranks over which tensor-parallel parameters are sharded: dp_shard x cp. With replication
    two-dimensional: (dp_replicate, dp_shard x cp)."""
    stage_shard: DeviceMesh
    """Ranks over which all other parameters are sharded: dp_shard x cp x tp. With replication
    two-dimensional: (dp_replicate, dp_shard x cp x tp)."""


def build_mesh(layout: ParallelLayout, device_type: str) -> Meshes:
    """Build the meshes of a layout over the initialised world.

    Communication: creates process groups, so all ranks of the world call it.

    Args:
        layout: its `world_size` is that of the process group; `problems` found none.
        device_type: of the backend, for example `cpu`.
    """
    world = init_device_mesh(device_type, (layout.world_size,), mesh_dim_names=("world",))

    # Axis names are unique under a root, so every cut of the same ranks needs names of its own.
    def cut(sizes: dict[str, int]) -> DeviceMesh:
        return unflatten_mesh(world, tuple(sizes.values()), tuple(sizes))

    dense = cut({axis: layout.size(axis) for axis in DENSE_AXES})
    expert = cut({f"expert_{axis}": layout.size(axis) for axis in EXPERT_AXES})
    pp, copies = layout.pipeline, layout.data_replicate
    per_copy = layout.data * layout.context
    by_tensor = cut(
        {"tensor_pp": pp, "tensor_copies": copies, "fsdp": per_copy, "tensor_tp": layout.tensor}
    )
    by_stage = cut({"stage_pp": pp, "stage_copies": copies, "full_shard": per_copy * layout.tensor})
    expert_shard = expert["expert_edp"]
    expert_copies = layout.expert_replicate
    if expert_copies > 1:
        by_expert = cut(
            {
                "copied_pp": pp,
                "expert_copies": expert_copies,
                "expert_shard": layout.expert_data_parallel_size // expert_copies,
                "copied_ep": layout.expert,
            }
        )
        expert_shard = by_expert["expert_copies", "expert_shard"]
    return Meshes(
        world=world,
        dense=dense,
        experts=expert,
        pp=dense["pp"],
        # FSDP2 joins this one with `tensor_shard`, so both come from the same cut.
        tp=by_tensor["tensor_tp"],
        cp=dense["cp"],
        sequence=flatten_mesh(dense["cp", "tp"], "sequence"),
        stage=flatten_mesh(dense["dp_replicate", "dp_shard", "cp", "tp"], "stage"),
        ep=(by_expert["copied_ep"] if expert_copies > 1 else expert["expert_ep"]),
        expert_shard=expert_shard,
        tensor_shard=by_tensor["tensor_copies", "fsdp"] if copies > 1 else by_tensor["fsdp"],
        stage_shard=(
            by_stage["stage_copies", "full_shard"] if copies > 1 else by_stage["full_shard"]
        ),
    )


def host_group(layout: ParallelLayout, timeout_seconds: float) -> dist.ProcessGroup | None:
    """A group of its own over the ranks of this rank's pipeline stage, for data in host memory.

    Communication: creates process groups, so all ranks of the world call it.

    Args:
        layout: of the world.
        timeout_seconds: a collective that waits longer fails.

    Returns:
        None if the stage is one rank.
    """
    if layout.stage_size == 1:
        return None
    own = None
    for ranks in layout.groups(*STAGE_AXES):
        group = dist.new_group(ranks, timedelta(seconds=timeout_seconds), backend="gloo")
        if dist.get_rank() in ranks:
            own = group
    return own
