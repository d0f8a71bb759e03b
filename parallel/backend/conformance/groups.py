"""Checks of meetings: messages between two ranks, barriers, objects, groups, sharded parameters."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from parallel.backend.conformance.checks import DeviationError, Ranks, expect
from parallel.collectives import sum_over
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh, host_group

_LATE_SECONDS = 0.2


def messages(ranks: Ranks) -> None:
    """Around a ring: sent in the background, received at once."""
    if ranks.size == 1:
        return
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        sent, received = ranks.ramp(dtype), torch.empty(5, dtype=dtype, device=ranks.device)
        work = dist.isend(sent, after)
        dist.recv(received, before)
        if work is not None:
            work.wait()
        expected = [ranks.value(before, place) for place in range(5)]
        expect(received, expected, f"message of {dtype}")


def crossing_messages(ranks: Ranks) -> None:
    """Both ways between neighbours in one batch, as pipelines send activations and gradients."""
    if ranks.size == 1:
        return
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sent = [ranks.ramp(torch.float32), -ranks.ramp(torch.float32)]
    received = [torch.empty_like(x) for x in sent]
    ops = [
        dist.P2POp(dist.isend, sent[0], after),
        dist.P2POp(dist.irecv, received[0], before),
        dist.P2POp(dist.isend, sent[1], before),
        dist.P2POp(dist.irecv, received[1], after),
    ]
    if ranks.size == 2:  # messages between the same two arrive in the order in which they were sent
        ops = [ops[0], ops[2], ops[1], ops[3]]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    ranks.backend.synchronize()
    for got, source, sign in ((received[0], before, 1), (received[1], after, -1)):
        expected = [sign * ranks.value(source, place) for place in range(5)]
        expect(got, expected, f"message from rank {source}")


def barrier(ranks: Ranks) -> None:
    """Nobody leaves before the last one comes. Times are of one host's clock."""
    time.sleep(_LATE_SECONDS * ranks.rank / ranks.size)
    came = time.monotonic()
    dist.barrier()
    ranks.backend.synchronize()
    left = time.monotonic()
    times: list[Any] = [None] * ranks.size
    dist.all_gather_object(times, (came, left))
    last, first = max(came for came, _ in times), min(left for _, left in times)
    if first < last:
        raise DeviationError(f"a rank left {last - first:.3f} s before the last one came")


def objects(ranks: Ranks) -> None:
    """Python objects of different sizes: gathered, scattered and broadcast, as checkpoints do."""
    mine = {"rank": ranks.rank, "text": "x" * (100 * ranks.rank)}
    all_of_them = [{"rank": rank, "text": "x" * (100 * rank)} for rank in range(ranks.size)]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, mine)
    expect(found, all_of_them, "gathered objects")
    on_first: list[Any] | None = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(mine, on_first)
    if ranks.rank == 0:
        expect(on_first, all_of_them, "objects on rank 0")
    given: list[Any] = [None]
    dist.scatter_object_list(given, all_of_them)
    expect(given, [mine], "scattered object")
    told: list[Any] = [all_of_them if ranks.rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    expect(told, [all_of_them], "broadcast object")


def groups(ranks: Ranks) -> None:
    """Disjoint groups at the same time, whose members were named in another order; one rank, too."""
    half = max(1, ranks.size // 2)
    members = [list(range(half)), list(range(ranks.size - 1, half - 1, -1))]
    made = [dist.new_group(some) for some in members if some]
    singles = [dist.new_group([rank]) for rank in range(ranks.size)]
    own = int(ranks.rank >= half)
    total = sum_over(ranks.ramp(torch.float32), made[own], "ep")
    expected = [sum(ranks.value(rank, place) for rank in members[own]) for place in range(5)]
    expect(total, expected, f"sum over ranks {sorted(members[own])}")
    alone = sum_over(ranks.ramp(torch.float32), singles[ranks.rank], "ep")
    expect(alone, ranks.ramp(torch.float32).tolist(), "sum over one rank")


def meshes(ranks: Ranks) -> None:
    """The groups of a layout, all cut out of one mesh; each has the ranks that arithmetic says."""
    even = ranks.size % 2 == 0
    layouts = [ParallelLayout(data=ranks.size, expert=ranks.size)]
    if even:
        layouts += [
            ParallelLayout(data=ranks.size // 2, tensor=2, expert=ranks.size),
            ParallelLayout(data=ranks.size // 2, pipeline=2),
            ParallelLayout(data=ranks.size // 2, context=2, expert=2),
        ]
    for layout in layouts:
        made = build_mesh(layout, ranks.backend.device_type)
        axes = {"tp": made.tp, "pp": made.pp, "cp": made.cp, "ep": made.ep}
        for axis, mesh in axes.items():
            [own] = [some for some in layout.groups(axis) if ranks.rank in some]
            group = mesh.get_group()
            expect(sorted(dist.get_process_group_ranks(group)), sorted(own), f"{axis} of {layout}")
            total = sum_over(ranks.ramp(torch.float32, 1), group, "ep")
            expected = [float(sum(ranks.value(rank, 0) for rank in own))]
            expect(total, expected, f"sum over {axis} of {layout}")


def host_memory(ranks: Ranks) -> None:
    """A group of its own for tensors in host memory, beside the device's."""
    group = host_group(ParallelLayout(data=ranks.size), 60.0)
    if group is None:
        return
    mine = torch.full((3,), ranks.rank, dtype=torch.int64)
    received = torch.empty(ranks.size, dtype=torch.int64)
    counts = [1] * ranks.size
    dist.all_to_all_single(
        received, mine.new_full((ranks.size,), ranks.rank), counts, counts, group=group
    )
    expect(received, list(range(ranks.size)), "all-to-all in host memory")
    half = torch.arange(3, dtype=torch.float64) / 3
    dist.all_reduce(half, group=group)
    expect(half, [ranks.size * (x / 3) for x in range(3)], "sum of float64 in host memory")


def sharded_parameters(ranks: Ranks) -> None:
    """FSDP2 gathers a layer and sums its gradient over the ranks, as one process would."""
    with torch.device(ranks.device):
        layer = nn.Linear(8, 6, bias=False)
    weight = torch.arange(48.0, device=ranks.device).view(6, 8) / 16 - 1
    mesh = build_mesh(ParallelLayout(data=ranks.size), ranks.backend.device_type).stage_shard
    with torch.no_grad():
        layer.weight.copy_(weight)
    fully_shard(layer, mesh=mesh)
    layer.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    layer.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    inputs = [torch.full((2, 8), rank + 1.0, device=ranks.device) for rank in range(ranks.size)]
    result = layer(inputs[ranks.rank])
    expect(result, (inputs[ranks.rank] @ weight.T).tolist(), "a gathered layer")
    result.sum().backward()
    gradient = layer.weight.grad
    assert isinstance(gradient, DTensor), "FSDP2 shards gradients"
    expected = 2.0 * sum(range(1, ranks.size + 1))
    expect(gradient.full_tensor(), [[expected] * 8] * 6, "a summed gradient")
