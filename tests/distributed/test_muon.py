"""Muon and the balanced momentum update matrices that are cut in every way as one rank does."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.layout import ParallelLayout
from parallel.mesh import Meshes, build_mesh
from parallel.torch_compat import place_tensor_parallel
from tests.harness import run_distributed
from train.optim import rounds
from train.optim.muon import Muon
from train.optim.newton_schulz import flops
from train.optim.sinkhorn_momentum import SinkhornMomentum

STEPS = 2


@dataclass(frozen=True)
class Kind:
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    tensor_dim: int | None = None
    """Dim that tensor parallelism cuts."""


# Rows that no number of ranks divides, fewer rows than ranks, several matrices in one parameter,
# and parameters cut by tensor parallelism along either dim.
MATRICES = {
    "square": Kind((10, 10), (10,)),
    "stacked": Kind((11, 6), (4, 4, 3)),
    "few": Kind((3, 7), (3,)),
    "by_rows": Kind((10, 10), (10,), 0),
    "by_rows_stacked": Kind((12, 6), (4, 8), 0),
    "few_by_rows": Kind((3, 10), (3,), 0),
    "by_columns": Kind((10, 8), (10,), 1),
    "few_by_columns": Kind((2, 6), (2,), 1),
}
EXPERTS = {"gate_up": Kind((6, 8, 5), (4, 4)), "down": Kind((6, 5, 4), (5,))}
TABLES = {"table": Kind((13, 4), ()), "table_by_rows": Kind((14, 4), (), 0)}
ALL = MATRICES | EXPERTS | TABLES


def random(name: str, step: int) -> Tensor:
    """Start value (step 0) and gradients of a parameter."""
    seed = 100 * list(ALL).index(name) + step
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(ALL[name].shape, dtype=torch.float64, generator=generator)
    if name in TABLES:
        # Just above the norm below which rows are dropped: their mean norm must not be off by 2.
        value[3] = 1.2e-3
    return value


class Weights(nn.Module):
    """Its loss has given gradients, of which each rank brings an equal share."""

    def __init__(self, names: dict[str, Kind], cut: DeviceMesh | None, ranks: int) -> None:
        super().__init__()
        self.cut, self.ranks = cut, ranks
        for name in names:
            self.register_parameter(name, nn.Parameter(self.part(name, random(name, 0))))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank has of a tensor while it is not sharded."""
        dim = 0 if name in EXPERTS else ALL[name].tensor_dim
        if self.cut is None or dim is None:
            return whole
        return distribute_tensor(whole, self.cut, [Shard(dim)], src_data_rank=None)

    def forward(self, step: int) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for name, parameter in self.named_parameters(recurse=False):
            cut = self.cut is not None and isinstance(parameter, DTensor)
            ranks = self.ranks // (self.cut.size() if cut and self.cut is not None else 1)
            gradient = self.part(name, random(name, step)) / ranks
            loss = loss + (local(parameter) * local(gradient)).sum()
        return loss


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Model(nn.Module):
    def __init__(self, meshes: Meshes | None, ranks: int) -> None:
        super().__init__()
        tensor = meshes.tp if meshes and meshes.tp.size() > 1 else None
        self.dense = Weights(MATRICES | TABLES, tensor, ranks)
        self.experts = Weights(EXPERTS, meshes.ep if meshes else None, ranks)

    def forward(self, step: int) -> Tensor:
        total: Tensor = self.dense(step) + self.experts(step)
        return total


def optimizers(model: Model, stage: Any = None) -> tuple[Muon, SinkhornMomentum]:
    named = {name.split(".")[1]: p for name, p in model.named_parameters()}
    kinds = MATRICES | EXPERTS
    muon = Muon(
        [named[name] for name in kinds],
        [kind.rows for kind in kinds.values()],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        update_rms=0.18,
        dtype=torch.float64,
        stage=stage,
    )
    groups: list[dict[str, object]] = [{"params": [named[name] for name in TABLES]}]
    tables = SinkhornMomentum(groups, lr=0.02, momentum=0.95, update_rms=0.18, stage=stage)
    return muon, tables


def updated(model: Model, both: tuple[Muon, SinkhornMomentum]) -> dict[str, NDArray[Any]]:
    for step in range(1, STEPS + 1):
        torch.autograd.backward(model(step))
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    result = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        result[name] = whole.detach().numpy().copy()
    return result


@cache
def reference() -> dict[str, NDArray[Any]]:
    model = Model(None, 1)
    return updated(model, optimizers(model))


def sharded(layout: ParallelLayout) -> tuple[Model, Meshes]:
    meshes = build_mesh(layout, "cpu")
    model = Model(meshes, layout.stage_size)
    fully_shard(model.experts, mesh=meshes.expert_shard)
    place = place_tensor_parallel(meshes.tensor_shard)
    fully_shard(model, mesh=meshes.stage_shard, shard_placement_fn=place)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model, meshes


def update(rank: int, layout: ParallelLayout, bound: int) -> dict[str, NDArray[Any]]:
    """The updated parameters, from rounds of at most `bound` elements."""
    rounds.ROUND_ELEMENTS = bound
    model, meshes = sharded(layout)
    stage = meshes.stage.get_group()
    both = optimizers(model, stage)
    check_plan(both[0], bound)
    calls, exchange = [0], dist.all_to_all_single

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return exchange(*args, **options)

    dist.all_to_all_single = counted
    result = updated(model, both)
    shared = [planned for planned in both[0]._rounds if planned.group is not None]
    assert calls[0] == STEPS * 2 * len(shared)
    return result


def check_plan(muon: Muon, bound: int) -> None:
    """Owners have about equal work; a round has one matrix per rank or stays below the bound."""
    loads: dict[Any, list[int]] = {}
    costliest: dict[Any, int] = {}
    for planned in muon._rounds:
        size = 1 if planned.group is None else planned.group.size()
        elements = [0] * size
        for matrices, owner in zip(planned.matrices, planned.owners, strict=True):
            cost = matrices.count * flops(*matrices.shape)
            loads.setdefault(planned.group, [0] * size)[owner] += cost
            costliest[planned.group] = max(costliest.get(planned.group, 0), cost)
            # Of each owner's matrices its part comes in for every copy, all in all as much.
            elements[owner] += matrices.count * math.prod(matrices.shape) * matrices.spread.copies
        one = math.prod(planned.matrices[0].shape) * planned.matrices[0].spread.copies
        assert max(elements) <= max(bound, one)
    for group, load in loads.items():
        # As a schedule that gives each job to the least loaded rank must be (Graham, 1969).
        assert max(load) * len(load) <= sum(load) + (len(load) - 1) * costliest[group]


# Some with all matrices at once, some with rounds of a matrix or two.
CASES = [
    (ParallelLayout(tensor=3), 150),
    (ParallelLayout(data=2, tensor=2, expert=2), 150),
    (ParallelLayout(data=4, expert=2, whole_experts=True), 150),
]
LARGE = [
    (ParallelLayout(data=4, expert=2), 1 << 26),
    (ParallelLayout(data_replicate=2, tensor=2), 1 << 26),
    (ParallelLayout(data_replicate=2, data=2, expert=2), 150),
    (ParallelLayout(data_replicate=2, data=2, tensor=2, expert=2), 150),
    (ParallelLayout(data_replicate=2, data=2, tensor=2, expert=2), 1 << 26),
    (ParallelLayout(data_replicate=2, context=2, tensor=2, expert=2, whole_experts=True), 1 << 26),
    (ParallelLayout(data_replicate=4, data=2), 150),
    (ParallelLayout(data=8), 1 << 26),
    # Every stage has matrices of its own, here by chance the same.
    (ParallelLayout(pipeline=2, data=2, tensor=2, expert=2), 150),
]


@pytest.mark.parametrize(
    ("layout", "bound"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)],
    ids=str,
)
def test_every_way_to_cut_a_matrix_gives_the_update_of_one_rank(
    layout: ParallelLayout, bound: int
) -> None:
    found = run_distributed(update, layout.world_size, layout, bound)
    for name, value in reference().items():
        start = random(name.split(".")[1], 0).numpy()
        assert np.abs(value - start).max() > 1e-3, name
        assert np.abs(found[0][name] - value).max() <= 1e-12, name
        # Copies were updated by the same numbers, bit by bit.
        for other in found[1:]:
            assert np.array_equal(other[name], found[0][name]), name
