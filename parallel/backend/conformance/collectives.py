"""Checks of the collectives that the framework calls, as it calls them, in the types that it sends."""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.backend.conformance.checks import (
    DeviationError,
    Ranks,
    expect,
    expect_bits,
    in_type,
    refuses,
    world_group,
)
from parallel.backend.gather import all_gather, reduce_scatter
from parallel.collectives import (
    all_to_all,
    exchange_rows,
    gather_dim1,
    gather_ranks,
    largest_over,
    reduce_scatter_dim1,
    start_exchange,
    sum_over,
)

_REDUCED = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_MOVED = (*_REDUCED, torch.uint8, torch.bool)


def sums(ranks: Ranks) -> None:
    """All-reduce, SUM; a long one too, which libraries send in pieces."""
    for dtype in _REDUCED:
        total = sum_over(ranks.ramp(dtype))
        expect(total, [sum(ranks.values(place)) for place in range(5)], f"sum of {dtype}")
    tiny = 2.0**-20  # lost where sums are made in fewer digits than fp32 has
    exact = torch.tensor([1.0 + tiny * ranks.rank], device=ranks.device)
    expected = sum(1.0 + tiny * rank for rank in range(ranks.size))
    expect(sum_over(exact), [torch.tensor(expected).item()], "digits of a sum in fp32")
    long = torch.full((3_000_001,), ranks.rank + 1.0, device=ranks.device)
    expected = ranks.size * (ranks.size + 1) / 2
    expect(bool((sum_over(long) == expected).all()), True, "sum of 12 MB")


def largest_and_smallest(ranks: Ranks) -> None:
    """All-reduce, MAX and MIN."""
    for dtype in _REDUCED:
        expected = [max(ranks.values(place)) for place in range(5)]
        expect(largest_over(ranks.ramp(dtype), world_group(), "world"), expected, f"max of {dtype}")
        smallest = ranks.ramp(dtype)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        expected = [min(ranks.values(place)) for place in range(5)]
        expect(smallest, expected, f"min of {dtype}")


def averages(ranks: Ranks) -> None:
    """Ours: a sum and a division. The library's own, if the backend claims one; else never silently wrong."""
    expected = sum(ranks.values(0)) / ranks.size
    mean = sum_over(ranks.ramp(torch.float32, 1)) / ranks.size
    expect(mean, [torch.tensor(expected).item()], "sum and division")
    native = ranks.ramp(torch.float32, 1)

    def average() -> None:
        dist.all_reduce(native, op=dist.ReduceOp.AVG)

    claimed = ranks.backend.capabilities.native_average
    if refuses(average):
        if claimed:
            raise DeviationError("ReduceOp.AVG is refused, though native_average is claimed")
    else:
        expect(native, [torch.tensor(expected).item()], "ReduceOp.AVG")


def double_precision(ranks: Ranks) -> None:
    """Sums in fp64, if the backend claims them; else never silently less exact."""
    tiny = torch.tensor([1.0 + 2.0**-40 * ranks.rank], dtype=torch.float64)
    expected = sum(1.0 + 2.0**-40 * rank for rank in range(ranks.size))
    claimed = ranks.backend.capabilities.fp64
    found: list[Tensor] = []
    if refuses(lambda: found.append(sum_over(tiny.to(ranks.device)))):
        if claimed:
            raise DeviationError("a sum of float64 is refused, though fp64 is claimed")
    else:
        expect(found[0], [expected], "sum of float64")


def gathers(ranks: Ranks) -> None:
    """All-gather into one tensor: at once, later, and from its place in the result."""
    group = world_group()
    expected = [[ranks.value(rank, place) for place in range(4)] for rank in range(ranks.size)]
    for dtype in _MOVED:
        part = ranks.ramp(dtype, 4)
        rows = [in_type(row, dtype) for row in expected]
        expect(gather_ranks(part, group, "world"), rows, f"all-gather of {dtype}")
        whole = part.new_zeros(4 * ranks.size)
        work = all_gather(whole, part, group, async_op=True)
        if work is not None:
            work.wait()
        expect(whole.view(-1, 4), rows, f"later all-gather of {dtype}")
        whole = part.new_zeros(4 * ranks.size)
        place = whole.view(-1, 4)[ranks.rank].copy_(part)
        all_gather(whole, place, group)
        expect(whole.view(-1, 4), rows, f"all-gather in place of {dtype}")


def reduce_scatters(ranks: Ranks) -> None:
    """Reduce-scatter into one tensor, SUM."""
    for dtype in _REDUCED:
        part, summand = ranks.ramp(dtype, 3), ranks.ramp(dtype, 3 * ranks.size)
        reduce_scatter(part, summand, world_group())
        own = range(3 * ranks.rank, 3 * ranks.rank + 3)
        expect(part, [sum(ranks.values(place)) for place in own], f"reduce-scatter of {dtype}")


def even_exchange(ranks: Ranks) -> None:
    """All-to-all of as many rows for each rank."""
    for dtype in _MOVED:
        sent = ranks.ramp(dtype, 2 * ranks.size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        places = (2 * ranks.rank, 2 * ranks.rank + 1)
        expected = [ranks.value(rank, place) for rank in range(ranks.size) for place in places]
        expect(received, in_type(expected, dtype), f"all-to-all of {dtype}")


def uneven_exchange(ranks: Ranks) -> None:
    """All-to-all of another number of rows for every pair of ranks; none from or for some of them."""
    if not ranks.backend.capabilities.uneven_all_to_all:
        return
    group = world_group()

    def rows_for(source: int, target: int) -> int:
        return (source * target) % 3  # rank 0 sends nothing and gets nothing

    send = [rows_for(ranks.rank, target) for target in range(ranks.size)]
    receive = [rows_for(source, ranks.rank) for source in range(ranks.size)]
    expected = [source for source, count in enumerate(receive) for _ in range(count)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        rows = torch.full((sum(send), 8), ranks.rank, dtype=dtype, device=ranks.device)
        received = all_to_all(rows, send, receive, group, "ep")
        expect(received, [[source] * 8 for source in expected], f"uneven all-to-all of {dtype}")
    # Nobody has anything.
    nothing = torch.empty(0, 8, device=ranks.device)
    none = [0] * ranks.size
    expect(
        list(all_to_all(nothing, none, none, group, "ep").shape), [0, 8], "all-to-all of nothing"
    )


def transposed(ranks: Ranks) -> None:
    """Gradients of the exchanges and gathers travel back to where the numbers came from."""
    group, size = world_group(), ranks.size
    counts = [1] * size
    rows = torch.ones(size, 4, device=ranks.device, requires_grad=True)
    weight = float(ranks.rank + 1)
    for exchange in (exchange_rows, lambda *args: start_exchange(*args)()):
        [grad] = torch.autograd.grad(
            (exchange(rows, counts, counts, group, "ep") * weight).sum(), rows
        )
        expect(grad[:, 0], [target + 1.0 for target in range(size)], "gradient of an exchange")
    x = torch.ones(2, 3, device=ranks.device, requires_grad=True)
    [grad] = torch.autograd.grad((gather_dim1(x, group, "cp") * weight).sum(), x)
    expect(grad[0, 0].item(), size * (size + 1) / 2, "gradient of a gather")
    x = torch.ones(2, 3 * size, device=ranks.device, requires_grad=True)
    [grad] = torch.autograd.grad((reduce_scatter_dim1(x, group, "cp") * weight).sum(), x)
    expect(grad[0, ::3], [rank + 1.0 for rank in range(size)], "gradient of a reduce-scatter")


def broadcasts(ranks: Ranks) -> None:
    """From the last rank to all."""
    last = ranks.size - 1
    for dtype in _MOVED:
        x = ranks.ramp(dtype)
        dist.broadcast(x, last)
        expected = [ranks.value(last, place) for place in range(5)]
        expect(x, in_type(expected, dtype), f"broadcast of {dtype}")


def same_bits(ranks: Ranks) -> None:
    """A sum repeats bit by bit, and is the same on all ranks: each decides for itself about a step."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = ranks.noise(ranks.size * 1000, dtype=dtype)
        first = sum_over(whole)
        part = first.new_empty(1000)
        reduce_scatter(part, whole, world_group())
        gathered = gather_ranks(first, world_group(), "world")
        for rank, theirs in enumerate(gathered):
            expect_bits(theirs, first, f"all-reduce of {dtype} on ranks {ranks.rank} and {rank}")
        for _ in range(3):
            again = torch.empty_like(part)
            reduce_scatter(again, whole, world_group())
            expect_bits(again, part, f"repeated reduce-scatter of {dtype}")
            expect_bits(sum_over(whole), first, f"repeated all-reduce of {dtype}")


def later(ranks: Ranks) -> None:
    """Collectives under way at the same time, waited for in another order than they began."""
    values = [ranks.ramp(torch.float32) * scale for scale in (1, 10, 100)]
    works = [dist.all_reduce(value, async_op=True) for value in values]
    for work in reversed(works):
        assert work is not None, "this rank is in the group"
        work.wait()
    for value, scale in zip(values, (1, 10, 100), strict=True):
        expect(value, [scale * sum(ranks.values(place)) for place in range(5)], f"x {scale}")
