"""The whole parameter is bitwise the same however it is cut."""

from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from parallel import initialize
from parallel.initialize import Init, fill_parameters
from parallel.layout import ParallelLayout
from parallel.local_tensors import cut_parameters
from parallel.mesh import build_mesh
from parallel.torch_compat import place_tensor_parallel
from tests.harness import run_distributed

# Rows: fewer than ranks, uneven, and more than one page of values.
SHAPES = {"small": (3,), "uneven": (7, 5), "large": (130, 67)}
# Cut over tensor-parallel ranks along dim 0 or 1, and some explicit values, too.
CUT = {
    "columns": (0, (12, 5)),
    "logits": (0, (4,)),
    "rows": (1, (7, 12)),
    "large_rows": (1, (66, 140)),
}
EXPERTS = (6, 5, 3)


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.cut = nn.ModuleDict({name: Holder(*shape) for name, (_, shape) in CUT.items()})
        self.experts = Holder(*EXPERTS)


INITS = {
    "small": Init.explicit(torch.arange(3.0)),
    "uneven": Init.normal(1.0),
    "large": Init.normal(0.02),
    "experts.weight": Init.normal(1.0),
    "cut.columns.weight": Init.normal(1.0),
    "cut.logits.weight": Init.explicit(torch.arange(4.0)),
    "cut.rows.weight": Init.explicit(torch.arange(84.0).view(7, 12)),
    "cut.large_rows.weight": Init.normal(0.02),
}


def filled(rank: int, layout: ParallelLayout) -> dict[str, NDArray[Any]]:
    initialize._BLOCK = 2500  # several blocks of rows
    meshes = build_mesh(layout, "cpu")
    with torch.device("meta"):
        model = Parts()
    cut_parameters(model.experts, meshes.ep, 0)
    if layout.tensor > 1:
        for name, (dim, _) in CUT.items():
            cut_parameters(model.cut[name], meshes.tp, dim)
    fully_shard(model.experts, mesh=meshes.expert_shard)
    place = place_tensor_parallel(meshes.tensor_shard)
    fully_shard(model, mesh=meshes.stage_shard, shard_placement_fn=place)
    model.to_empty(device="cpu")
    fill_parameters(model.named_parameters(), INITS, seed=4)
    whole = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole[name] = parameter.full_tensor().detach().numpy().copy()
    return whole


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(data=4, expert=2),
        ParallelLayout(data=3, expert=3),
        ParallelLayout(data=2, tensor=2, expert=2),
        ParallelLayout(tensor=4, expert=2),
        ParallelLayout(data_replicate=2, tensor=2),
        ParallelLayout(data=4, expert=2, whole_experts=True),
    ],
    ids=str,
)
def test_every_layout_starts_from_the_same_values(layout: ParallelLayout) -> None:
    plain = Parts()
    fill_parameters(plain.named_parameters(), INITS, seed=4)
    for whole in run_distributed(filled, layout.world_size, layout):
        for name, parameter in plain.named_parameters():
            assert torch.equal(torch.from_numpy(whole[name]), parameter.detach()), name
