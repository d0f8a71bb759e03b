"""The global norm over shards, replicas and meshes, against the norm of the whole gradients."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from parallel.gradients import clip_by_global_norm
from parallel.layout import ParallelLayout
from parallel.local_tensors import cut_parameters
from parallel.mesh import Meshes, build_mesh
from parallel.torch_compat import place_tensor_parallel
from tests.harness import run_distributed

BOUNDS = (0.5, 1e9)
WHOLE = {
    "plain": (3,),
    "replicated": (4,),
    "sharded": (6, 2),
    "few_rows": (2, 3),
    "experts": (6, 3),
    "columns": (8, 3),
    "rows": (3, 8),
}


def whole_gradients(stage: int) -> dict[str, Tensor]:
    """Those of a pipeline stage."""
    generator = torch.Generator().manual_seed(stage)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in WHOLE.items()
    }


class Holder(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


def spread(meshes: Meshes, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of zeros with the given gradients, stored in every way there is."""
    names = ("plain", "replicated")
    held = {name: Holder(value) for name, value in whole.items() if name not in names}
    cut_parameters(held["experts"], meshes.ep, 0)
    if meshes.tp.size() > 1:
        cut_parameters(held["columns"], meshes.tp, 0)
        cut_parameters(held["rows"], meshes.tp, 1)
    fully_shard(held["experts"], mesh=meshes.expert_shard)
    place = place_tensor_parallel(meshes.tensor_shard)
    others: list[nn.Module] = [module for name, module in held.items() if name != "experts"]
    fully_shard(others, mesh=meshes.stage_shard, shard_placement_fn=place)
    stored = {name: module.weight.detach() for name, module in held.items()}
    stored["plain"] = whole["plain"]
    stored["replicated"] = distribute_tensor(whole["replicated"], meshes.stage, [Replicate()])
    parameters = {}
    for name in WHOLE:
        gradient = stored[name]
        parameters[name] = torch.zeros_like(gradient).requires_grad_()
        parameters[name].grad = gradient.clone()
    return parameters


def clipped(rank: int, layout: ParallelLayout) -> list[tuple[float, dict[str, NDArray[Any]]]]:
    """Norm and gradients afterwards for each of `BOUNDS`."""
    meshes, stage = build_mesh(layout, "cpu"), layout.coordinates(rank)["pp"]
    return [
        clip(spread(meshes, whole_gradients(stage)), bound, layout.stage_size) for bound in BOUNDS
    ]


def clip(
    parameters: dict[str, Tensor], bound: float, stage_size: int
) -> tuple[float, dict[str, NDArray[Any]]]:
    norm = clip_by_global_norm(parameters, bound, stage_size=stage_size).item()
    after = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        after[name] = full.numpy().copy()
    return norm, after


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(data=4, expert=2),
        ParallelLayout(data=2, tensor=2, expert=2),
        ParallelLayout(data_replicate=2, tensor=2),
        ParallelLayout(pipeline=2, tensor=2, expert=2),
    ],
    ids=str,
)
def test_norm_and_clipping_equal_those_of_whole_gradients(layout: ParallelLayout) -> None:
    answers = run_distributed(clipped, layout.world_size, layout)
    stages = [whole_gradients(stage) for stage in range(layout.pipeline)]
    for index, bound in enumerate(BOUNDS):
        parameters = [torch.zeros_like(g).requires_grad_() for s in stages for g in s.values()]
        gradients = [gradient for stage in stages for gradient in stage.values()]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(parameters, bound).item()
        assert len({answer[index][0] for answer in answers}) == 1
        for rank, answer in enumerate(answers):
            norm, after = answer[index]
            assert norm == pytest.approx(expected_norm, rel=1e-14)
            mine = parameters[layout.coordinates(rank)["pp"] * len(WHOLE) :]
            for name, parameter in zip(WHOLE, mine, strict=False):
                assert parameter.grad is not None
                np.testing.assert_allclose(after[name], parameter.grad.numpy(), rtol=1e-14)


def fp32_norm(rank: int) -> tuple[float, torch.dtype]:
    parameter = torch.zeros(2).requires_grad_()
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = clip_by_global_norm({"w": parameter}, 10.0, stage_size=1, sum_dtype=torch.float32)
    return norm.item(), norm.dtype


def test_the_sum_can_be_fp32_where_there_is_no_fp64() -> None:
    assert run_distributed(fp32_norm, 1) == [(5.0, torch.float32)]


def missing(rank: int) -> str:
    """Only rank 1 lacks a gradient, and neither rank waits for the other."""
    used, frozen = torch.zeros(1).requires_grad_(), torch.zeros(1)
    if rank == 0:
        used.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="no gradient after backward") as error:
        clip_by_global_norm({"used": used, "frozen": frozen}, 1.0, stage_size=2)
    dist.barrier()
    return str(error.value)


def test_a_missing_gradient_fails_on_all_ranks_and_is_named() -> None:
    messages = run_distributed(missing, 2)
    assert "parameters of other ranks" in messages[0]
    assert "['used']" in messages[1]
