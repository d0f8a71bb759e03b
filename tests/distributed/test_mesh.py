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


def check_copies(rank: int, mesh: DeviceMesh, shards: list[int], copies: list[int]) -> None:
    """A mesh (copies, shards), or (shards) where there is one copy, has these groups of a rank."""
    assert mesh.ndim == (2 if len(copies) > 1 else 1)
    if mesh.ndim == 2:
        assert dist.get_process_group_ranks(mesh.get_group(0)) == copies
        assert dist.get_process_group_ranks(mesh.get_group(1)) == shards
        assert mesh.get_coordinate() == (copies.index(rank), shards.index(rank))
    else:
        assert ranks_of(mesh) == shards
        assert mesh.get_local_rank() == shards.index(rank)


def group_of(rank: int, layout: ParallelLayout, *axes: str) -> list[int]:
    [mine] = [group for group in layout.groups(*axes) if rank in group]
    return mine


def check_experts(rank: int, mesh: DeviceMesh, layout: ParallelLayout) -> None:
    """Counted out: ranks share a shard of experts if they have the same ones, a copy if that is one.

    The copies of experts are those of all parameters, unless they are whole on every rank, or a
    copy of the parameters has no copy of all experts.
    """
    same = group_of(rank, layout, "edp")
    copy_of = [layout.coordinates(r)["dp_replicate"] for r in same]
    if layout.whole_experts:
        copy_of = list(range(len(same)))
    elif layout.stage_size // layout.data_replicate % layout.expert:
        copy_of = [0] * len(same)
    mine = copy_of[same.index(rank)]
    shards = [r for r, copy in zip(same, copy_of, strict=True) if copy == mine]
    place = shards.index(rank)
    in_order = [[r for r, c in zip(same, copy_of, strict=True) if c == n] for n in set(copy_of)]
    check_copies(rank, mesh, shards, [copy[place] for copy in in_order])


def check(rank: int, layout: ParallelLayout) -> None:
    meshes = build_mesh(layout, "cpu")
    for mesh, axes in (
        (meshes.pp, ("pp",)),
        (meshes.tp, ("tp",)),
        (meshes.cp, ("cp",)),
        (meshes.ep, ("ep",)),
        (meshes.sequence, SEQUENCE_AXES),
        (meshes.stage, STAGE_AXES),
    ):
        mine = group_of(rank, layout, *axes)
        assert ranks_of(mesh) == mine, axes
        assert mesh.get_local_rank() == mine.index(rank)
    copies = group_of(rank, layout, "dp_replicate")
    check_copies(rank, meshes.tensor_shard, group_of(rank, layout, "dp_shard", "cp"), copies)
    check_copies(rank, meshes.stage_shard, group_of(rank, layout, "dp_shard", "cp", "tp"), copies)
    check_experts(rank, meshes.expert_shard, layout)
    assert ranks_of(meshes.world) == list(range(layout.world_size))


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(pipeline=2, data=2, expert=2),
        ParallelLayout(data=2, tensor=2, expert=4),
        ParallelLayout(context=2, tensor=2, expert=2),
        ParallelLayout(data_replicate=2, data=2, expert=2),
        ParallelLayout(data=4, expert=2, whole_experts=True),
        ParallelLayout(data_replicate=2, data=2, tensor=2, expert=2),
        ParallelLayout(pipeline=2, data_replicate=2, tensor=2, expert=2, whole_experts=True),
        ParallelLayout(data_replicate=2, context=2, tensor=2, expert=8),
    ],
    ids=str,
)
def test_meshes_agree_with_the_layout(layout: ParallelLayout) -> None:
    run_distributed(check, layout.world_size, layout)
