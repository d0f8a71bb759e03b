"""The simulated HCCL refuses by name what the real one lacks, whoever asks: us, FSDP2, or DTensor."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from parallel.backend.conformance.checks import world_group
from parallel.collectives import gather_ranks, sum_over
from tests.distributed.backend_ranks import join, run_on

REFUSED = [
    ("all_reduce", "float64", "SUM", "all_reduce with ReduceOp.SUM of torch.float64: HCCL has none; use torch.float32"),
    ("all_reduce", "complex128", "SUM", "all_reduce with ReduceOp.SUM of torch.float64"),
    ("all_reduce", "uint64", "SUM", "of torch.uint64: HCCL has none; use torch.int64"),
    ("all_reduce", "float32", "AVG", "all_reduce with ReduceOp.AVG: HCCL has none; use SUM, and divide"),
    ("all_reduce", "int32", "BAND", "ReduceOp.BAND: HCCL has none; use MIN"),
    ("all_reduce", "int32", "BOR", "ReduceOp.BOR: HCCL has none; use MAX"),
    ("all_reduce", "int32", "BXOR", "ReduceOp.BXOR: HCCL has none; use an all-gather"),
    ("reduce", "float64", "SUM", "reduce with ReduceOp.SUM of torch.float64"),
    ("reduce_scatter", "float64", "SUM", "reduce_scatter with ReduceOp.SUM of torch.float64"),
    ("reduce_scatter", "float32", "AVG", "reduce_scatter with ReduceOp.AVG"),
    ("broadcast", "uint64", "", "broadcast of torch.uint64"),
    ("all_gather", "uint16", "", "all_gather of torch.uint16"),
    ("all_to_all", "uint32", "", "all_to_all of torch.uint32"),
    ("send", "uint64", "", "send of torch.uint64"),
]  # fmt: skip


def call(name: str, dtype: str, op: str) -> None:
    x = torch.ones(4, dtype=getattr(torch, dtype))
    options = {"op": getattr(dist.ReduceOp, op)} if op else {}
    if name == "all_reduce":
        dist.all_reduce(x, **options)
    elif name == "reduce":
        dist.reduce(x, 0, **options)
    elif name == "reduce_scatter":
        dist.reduce_scatter_single(x[:2].clone(), x, **options)
    elif name == "broadcast":
        dist.broadcast(x, 0)
    elif name == "all_gather":
        dist.all_gather_single(x.new_empty(8), x)
    elif name == "all_to_all":
        dist.all_to_all_single(torch.empty_like(x), x)
    else:
        dist.send(x, 1 - dist.get_rank())


def refusals(rank: int, port: int) -> list[str]:
    join("simulated", port)
    found = []
    for name, dtype, op, _ in REFUSED:
        try:
            call(name, dtype, op)
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append("not refused")
    dist.barrier()
    return found


def test_what_hccl_lacks_is_refused_with_what_to_use_instead() -> None:
    for found in run_on(refusals, 2):
        for (*_, expected), said in zip(REFUSED, found, strict=True):
            assert expected in said


def ask_from_inside_torch(rank: int, port: int) -> list[str]:
    """Collectives that torch begins by itself, partly in C++; also those of other groups."""
    join("simulated", port)
    mesh = init_device_mesh("cpu", (2,))
    pair = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["b"]
    layer = nn.Linear(4, 4, dtype=torch.float64)
    fully_shard(layer, mesh=pair)
    asked: list[Callable[[], object]] = [
        lambda: DTensor.from_local(
            torch.ones(2, dtype=torch.float64), mesh, [Partial()]
        ).full_tensor(),
        lambda: DTensor.from_local(torch.ones(2), mesh, [Partial("avg")]).full_tensor(),
        lambda: layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward(),
        lambda: sum_over(torch.ones(2, dtype=torch.float64), pair.get_group()),
    ]
    found = []
    for ask in asked:
        try:
            ask()
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append("not refused")
    half = nn.Linear(4, 4)
    fully_shard(half, mesh=pair)
    half.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    half.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    half(torch.ones(2, 4)).sum().backward()
    fine = DTensor.from_local(torch.ones(2), mesh, [Partial()]).full_tensor()
    assert fine.tolist() == [2.0, 2.0]
    gathered = gather_ranks(torch.ones(2, dtype=torch.float64), world_group(), "world")
    assert gathered.shape == (2, 2), "what only moves may be fp64"
    return found


def test_torch_itself_is_refused_too_and_served_otherwise() -> None:
    for found in run_on(ask_from_inside_torch, 2):
        for said in found:
            assert "HCCL has none" in said, found


def sum_often(rank: int, port: int) -> float:
    """So often that gloo's threads and Python's lock meet in every order."""
    join("simulated", port)
    total = torch.zeros(1)
    for number in range(1000):
        total += sum_over(torch.full((1,), float(number)))
    return total.item()


def test_many_collectives_do_not_deadlock() -> None:
    assert run_on(sum_often, 2) == [999.0 * 500.0 * 2] * 2
