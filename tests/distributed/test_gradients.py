"""The global norm over shards, replicas and meshes, against the norm of the whole gradients."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.gradients import clip_by_global_norm
from parallel.layout import ParallelLayout
from parallel.mesh import Meshes, build_mesh
from tests.harness import run_distributed

BOUNDS = (0.5, 1e9)
WHOLE = {
    "plain": (3,),
    "sharded": (6, 2),
    "fewer rows than ranks": (2, 3),
    "replicated": (4,),
    "experts": (5, 3),
}


def whole_gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in WHOLE.items()
    }


def spread(meshes: Meshes, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of zeros with the given gradients, stored in every way there is."""
    ways: dict[str, Any] = {
        "sharded": (meshes.tensor_shard, [Shard(0)]),
        "fewer rows than ranks": (meshes.tensor_shard, [Shard(0)]),
        "replicated": (meshes.tensor_shard, [Replicate()]),
        "experts": (meshes.ep, [Shard(0)]),
    }
    parameters = {}
    for name, gradient in whole.items():
        stored = distribute_tensor(gradient, *ways[name]) if name in ways else gradient.clone()
        parameters[name] = torch.zeros_like(stored).requires_grad_()
        parameters[name].grad = stored
    return parameters


def clipped(rank: int, data: int, expert: int) -> list[tuple[float, dict[str, NDArray[Any]]]]:
    """Norm and gradients afterwards for each of `BOUNDS`."""
    meshes = build_mesh(ParallelLayout(data=data, expert=expert), "cpu")
    return [clip(spread(meshes, whole_gradients()), bound) for bound in BOUNDS]


def clip(parameters: dict[str, Tensor], bound: float) -> tuple[float, dict[str, NDArray[Any]]]:
    norm = clip_by_global_norm(parameters, bound).item()
    after = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        after[name] = full.numpy().copy()
    return norm, after


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (3, 1), (4, 2), (4, 4)])
def test_norm_and_clipping_equal_those_of_whole_gradients(data: int, expert: int) -> None:
    answers = run_distributed(clipped, data, data, expert)
    for index, bound in enumerate(BOUNDS):
        parameters = [torch.zeros_like(g).requires_grad_() for g in whole_gradients().values()]
        for parameter, gradient in zip(parameters, whole_gradients().values(), strict=True):
            parameter.grad = gradient
        expected_norm = torch.nn.utils.clip_grad_norm_(parameters, bound).item()
        assert len({answer[index][0] for answer in answers}) == 1
        for norm, after in (answer[index] for answer in answers):
            assert norm == pytest.approx(expected_norm, rel=1e-14)
            for name, parameter in zip(WHOLE, parameters, strict=True):
                assert parameter.grad is not None
                np.testing.assert_allclose(after[name], parameter.grad.numpy(), rtol=1e-14)


def fp32_norm(rank: int) -> tuple[float, torch.dtype]:
    parameter = torch.zeros(2).requires_grad_()
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = clip_by_global_norm({"w": parameter}, 10.0, sum_dtype=torch.float32)
    return norm.item(), norm.dtype


def test_the_sum_can_be_fp32_where_there_is_no_fp64() -> None:
    assert run_distributed(fp32_norm, 1) == [(5.0, torch.float32)]


def missing(rank: int) -> str:
    """Only rank 1 lacks a gradient, and neither rank waits for the other."""
    used, frozen = torch.zeros(1).requires_grad_(), torch.zeros(1)
    if rank == 0:
        used.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="no gradient after backward") as error:
        clip_by_global_norm({"used": used, "frozen": frozen}, 1.0)
    dist.barrier()
    return str(error.value)


def test_a_missing_gradient_fails_on_all_ranks_and_is_named() -> None:
    messages = run_distributed(missing, 2)
    assert "parameters of other ranks" in messages[0]
    assert "['used']" in messages[1]
