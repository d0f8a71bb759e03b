"""The process groups of a layout as torch device meshes; built once by `train.build`.

All meshes are cut out of one root, because FSDP2 joins the mesh that shards a parameter with the
one on which it already is a DTensor, and can do so only under a common root. Axes of size 1 are
meshes like any other, so nothing downstream has a special case for an absent axis.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import DENSE_AXES, EXPERT_AXES, FSDP_AXES, STAGE_AXES, ParallelLayout
from parallel.torch_compat import flatten_mesh, unflatten_mesh


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """One-dimensional meshes; each holds the group of its axis that this rank belongs to."""

    world: DeviceMesh
    pp: DeviceMesh
    tp: DeviceMesh
    cp: DeviceMesh
    ep: DeviceMesh
    """Ranks that hold different experts."""
    edp: DeviceMesh
    """Ranks over which the parameters of the same experts are sharded."""
    fsdp: DeviceMesh
    """Ranks over which all other parameters are sharded: dp_shard x cp."""
    stage: DeviceMesh
    """All ranks of a pipeline stage (one program, many data)."""


def build_mesh(layout: ParallelLayout, device_type: str) -> Meshes:
    """Build the meshes of a layout over the initialised world.

    Communication: creates process groups, so all ranks of the world call it.

    Args:
        layout: its `world_size` is that of the process group; `problems` found none.
        device_type: of the backend, for example `cpu`.
    """
    assert layout.data_replicate == 1, (
        "no mesh shards over dp_shard and replicates over dp_replicate"
    )
    world = init_device_mesh(device_type, (layout.world_size,), mesh_dim_names=("world",))
    dense = unflatten_mesh(world, tuple(map(layout.size, DENSE_AXES)), DENSE_AXES)
    # Axis names are unique under a root, so the expert cut needs its own name for the pipeline.
    expert = unflatten_mesh(world, tuple(map(layout.size, EXPERT_AXES)), ("expert_pp", "edp", "ep"))
    return Meshes(
        world=world,
        pp=dense["pp"],
        tp=dense["tp"],
        cp=dense["cp"],
        ep=expert["ep"],
        edp=expert["edp"],
        fsdp=flatten_mesh(dense[FSDP_AXES], "fsdp"),
        stage=flatten_mesh(dense[STAGE_AXES], "stage"),
    )
