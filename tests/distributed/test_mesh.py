"""The process groups of torch are those that the arithmetic of the layout says."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.layout import SEQUENCE_AXES, STAGE_AXES, ParallelLayout
from parallel.mesh import build_mesh
from tests.harness import run_distributed


def ranks_of(mesh: DeviceMesh) -> list[int]:
    members = dist.get_process_group_ranks(mesh.get_group())
    assert mesh.ndim == 1
    assert mesh.mesh.tolist() == members
    return members


def check(rank: int, layout: ParallelLayout) -> None:
    meshes = build_mesh(layout, "cpu")
    for mesh, axes in (
        (meshes.pp, ("pp",)),
        (meshes.tp, ("tp",)),
        (meshes.cp, ("cp",)),
        (meshes.ep, ("ep",)),
        (meshes.expert_shard, ("edp",)),
        (meshes.sequence, SEQUENCE_AXES),
        (meshes.tensor_shard, ("dp_shard", "cp")),
        (meshes.stage_shard, ("dp_shard", "cp", "tp")),
        (meshes.stage, STAGE_AXES),
    ):
        (mine,) = [group for group in layout.groups(*axes) if rank in group]
        assert ranks_of(mesh) == mine, axes
        assert mesh.get_local_rank() == mine.index(rank)
    assert ranks_of(meshes.world) == list(range(layout.world_size))


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(data=4, expert=2),
        ParallelLayout(pipeline=2, data=2, expert=2),
        ParallelLayout(data=2, tensor=2, expert=4),
        ParallelLayout(context=2, tensor=2, expert=2),
    ],
    ids=str,
)
def test_meshes_agree_with_the_layout(layout: ParallelLayout) -> None:
    run_distributed(check, layout.world_size, layout)
