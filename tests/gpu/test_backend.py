"""The device's backend: memory, random numbers, a process group of one rank, and its collectives."""

import os

import pytest
import torch
import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.backend.select import select_backend
from parallel.collectives import (
    all_to_all,
    exchange_rows,
    gather_dim1,
    gather_ranks,
    largest_over,
    reduce_scatter_dim1,
    sum_over,
)
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from tests.gpu.worker import Worker

pytestmark = pytest.mark.gpu


def start(name: str) -> tuple[Backend, torch.device]:
    backend = select_backend(name)
    device = backend.device(int(os.environ["LOCAL_RANK"]))
    backend.set_device(device)
    return backend, device


def use_memory(name: str) -> tuple[int, int, int]:
    backend, device = start(name)
    assert backend.why_unavailable() is None
    assert torch.get_float32_matmul_precision() == "highest", "fp32 is fp32"
    backend.synchronize()
    backend.reset_peak_memory()
    before = backend.peak_memory_bytes()
    block = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    backend.synchronize()
    during = backend.peak_memory_bytes()
    del block
    backend.reset_peak_memory()
    return before, during, backend.peak_memory_bytes()


def test_peak_memory_rises_with_an_allocation_and_resets(device: Worker) -> None:
    before, during, after = device.call(use_memory)
    assert during >= before + (200 << 20)
    assert after < during - (200 << 20)


def continue_random_numbers(name: str) -> None:
    backend, device = start(name)
    backend.manual_seed(3)
    first = torch.rand(5, device=device)
    state = backend.rng_state()
    assert state.device.type == "cpu", "checkpoints hold it as a tensor of the host"
    assert state.dtype == torch.uint8
    expected = torch.rand(5, device=device)
    assert not torch.equal(first, expected)
    backend.set_rng_state(state)
    assert torch.equal(torch.rand(5, device=device), expected)
    backend.manual_seed(3)
    assert torch.equal(torch.rand(5, device=device), first)


def test_random_numbers_continue_from_a_state(device: Worker) -> None:
    device.call(continue_random_numbers)


def communicate(name: str) -> None:
    backend, device = start(name)
    backend.init_process_group(timeout_seconds=60.0)
    assert dist.get_world_size() == 1
    can = backend.capabilities
    dtypes = [torch.float32, torch.int64, torch.uint8]
    dtypes += [torch.bfloat16] * can.bf16 + [torch.float64] * can.fp64
    for where in {device, torch.device("cpu")}:
        for dtype in dtypes:
            value = torch.full((3,), 7, dtype=dtype, device=where)
            dist.all_reduce(value)
            assert value.tolist() == [7, 7, 7], (where, dtype)
        dist.broadcast(value, 0)
    if can.native_average:
        value = torch.full((2,), 0.5, device=device)
        dist.all_reduce(value, dist.ReduceOp.AVG)
        assert value.tolist() == [0.5, 0.5]
    found: list[object] = [None]
    dist.all_gather_object(found, {"rank": 0})
    assert found == [{"rank": 0}]

    meshes = build_mesh(ParallelLayout(), backend.device_type)
    for group in (dist.group.WORLD, meshes.ep.get_group(), meshes.sequence.get_group()):
        assert group is not None
        x = torch.randn(2, 4, 3, device=device, requires_grad=True)
        rows = x.flatten(0, 1)
        assert torch.equal(all_to_all(rows, [8], [8], group, "ep"), rows)
        assert torch.equal(exchange_rows(rows, [8], [8], group, "ep"), rows)
        assert torch.equal(gather_ranks(x, group, "cp"), x[None])
        assert torch.equal(gather_dim1(x, group, "cp"), x)
        assert torch.equal(reduce_scatter_dim1(x, group, "cp"), x)
        assert torch.equal(sum_over(x, group), x)
        assert torch.equal(largest_over(x, group, "cp"), x)
    backend.synchronize()
    dist.barrier()


def test_one_rank_joins_a_group_and_uses_every_collective(device: Worker) -> None:
    device.call(communicate)
