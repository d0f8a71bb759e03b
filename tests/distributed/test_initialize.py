"""The whole parameter is bitwise the same however it is cut."""

from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.initialize import Init, fill_parameters
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from tests.harness import run_distributed

# Rows: fewer than ranks, uneven, and more than one page of values.
SHAPES = {"small": (3,), "uneven": (7, 5), "large": (130, 67)}
EXPERTS = (6, 5, 3)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.experts = Experts()


INITS = {
    "small": Init.explicit(torch.arange(3.0)),
    "uneven": Init.normal(1.0),
    "large": Init.normal(0.02),
    "experts.weight": Init.normal(1.0),
}


def filled(rank: int, data: int, expert: int) -> dict[str, NDArray[Any]]:
    meshes = build_mesh(ParallelLayout(data=data, expert=expert), "cpu")
    with torch.device("meta"):
        model = Parts()
    weight = distribute_tensor(model.experts.weight, meshes.ep, [Shard(0)], src_data_rank=None)
    model.experts.weight = nn.Parameter(weight)
    fully_shard(model.experts, mesh=meshes.expert_shard)
    fully_shard(model, mesh=meshes.tensor_shard)
    model.to_empty(device="cpu")
    fill_parameters(model.named_parameters(), INITS, seed=4)
    whole = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole[name] = parameter.full_tensor().detach().numpy().copy()
    return whole


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (4, 1), (4, 2), (2, 2), (3, 3)])
def test_every_layout_starts_from_the_same_values(data: int, expert: int) -> None:
    plain = Parts()
    fill_parameters(plain.named_parameters(), INITS, seed=4)
    for whole in run_distributed(filled, data, data, expert):
        for name, parameter in plain.named_parameters():
            assert torch.equal(torch.from_numpy(whole[name]), parameter.detach()), name
