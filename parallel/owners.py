"""Whole matrices for computations that need them: each is assembled on one rank, its owner.

`train.optim` plans with it and calls it. Between the calls every rank holds parts of the matrices,
as FSDP2 and tensor parallelism cut them; where parts are replicated, the work is shared out among
the copies as well: one owner computes for all of them, so that copies stay equal bit by bit.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from parallel.collectives import exchange_rows
from parallel.shards import part_at
from parallel.volume import Axis


@dataclass(frozen=True)
class Part:
    """The rectangle of a matrix that a rank holds."""

    rows: range
    columns: range
    offset: int
    """First of these rows in what the rank holds of the parameter."""
    copy: int
    """Which of the copies of the matrix it belongs to; each copy's parts cover the matrix once."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.rows) * len(self.columns)

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """The rectangle in each of the whole matrices `[count, rows, columns]`."""
        rows, columns = self.rows, self.columns
        return slice(None), slice(rows.start, rows.stop), slice(columns.start, columns.stop)


@dataclass(frozen=True)
class Spread:
    """How a matrix is spread over ranks: it is some rows of a parameter that a mesh cuts."""

    rows: range
    """Of the parameter."""
    shape: tuple[int, int]
    """Rows and columns of the parameter."""
    mesh: tuple[int, ...]
    """Size of each axis; ranks are numbered row-major."""
    cuts: tuple[int | None, ...]
    """Dim that each axis cuts; None if its ranks hold the same."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        return len(self.rows), self.shape[1]

    @property
    def copies(self) -> int:
        """How often each element exists."""
        return math.prod(n for n, dim in zip(self.mesh, self.cuts, strict=True) if dim is None)

    def part(self, rank: int) -> Part:
        """What a rank holds."""
        return _part(self, rank)


@cache
def _part(spread: Spread, rank: int) -> Part:
    place: list[int] = []
    for size in reversed(spread.mesh):
        rank, index = divmod(rank, size)
        place = [index, *place]
    assert rank == 0, f"rank is beyond the mesh {spread.mesh}"
    copy = 0
    for index, size, dim in zip(place, spread.mesh, spread.cuts, strict=True):
        copy = copy if dim is not None else copy * size + index
    held, columns = part_at(place, spread.shape, spread.mesh, spread.cuts)
    matrix = spread.rows
    first = max(held.start, matrix.start)
    last = max(first, min(held.stop, matrix.stop))
    rows = range(first - matrix.start, last - matrix.start)
    return Part(rows, columns, first - held.start, copy)


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that one rank computes together."""

    count: int
    spread: Spread
    """How each of them is spread over the group."""
    owner: int
    """Rank of the group that computes them."""

    def place(self, rank: int) -> tuple[slice, slice, slice]:
        """What a rank holds of the stacked matrices."""
        return self.spread.part(rank).place

    def size(self, rank: int) -> int:
        """Elements that a rank holds."""
        return self.count * self.spread.part(rank).size

    def is_source(self, rank: int) -> bool:
        """Whether the owner gets parts from this rank: from those of its own copy."""
        return self.spread.part(rank).copy == self.spread.part(self.owner).copy


def balance(costs: Sequence[int], num_ranks: int) -> list[int]:
    """An owner for each of several jobs: the costliest first, each to the least loaded rank.

    The largest load is at most 4/3 of the best possible one (Graham, 1969). The same on all ranks.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        load, rank = loads[0]
        owners[job] = rank
        heapq.heapreplace(loads, (load + costs[job], rank))
    return owners


def map_whole_matrices(
    function: Callable[[Tensor], Tensor],
    held: Sequence[Float[Tensor, "_ _ _"]],
    jobs: Sequence[Job],
    group: dist.ProcessGroup,
    *,
    axis: Axis,
) -> list[Tensor]:
    """Apply `function` to matrices of one shape that ranks hold in parts; returns this rank's parts.

    Communication: two all-to-alls over `group`, parts to their owners and results back. Without
    copies a rank sends its parts of all matrices that it does not own, and gets as much back: over
    the group, twice (1 - 1/ranks) of the matrices' bytes, as a reduce-scatter and an all-gather
    would. Of c copies, each sends the parts of 1/c of the matrices, and all get all results.

    Args:
        function: `[own matrices, rows, columns]` to the same shape; not called with none.
        held: this rank's part of each job, `[count, rows here, columns here]`; may have none.
        jobs: the same on all ranks.
        group: the ranks that hold the parts.
        axis: what the group is.
    """
    rank, ranks = group.rank(), range(group.size())
    # Everything travels sorted by the other rank, then by this order.
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].owner)
    mine = [jobs[i] for i in order if jobs[i].owner == rank]

    def per_owner(indices: Sequence[int]) -> list[int]:
        sizes = [0] * len(ranks)
        for i in indices:
            sizes[jobs[i].owner] += held[i].numel()
        return sizes

    given = [i for i in order if jobs[i].is_source(rank)]
    arriving = [sum(job.size(r) for job in mine if job.is_source(r)) for r in ranks]
    empty = held[0].new_empty(0)
    flat = _exchange([empty, *(held[i] for i in given)], per_owner(given), arriving, group, axis)
    results: list[Tensor] = []
    if mine:
        stacks = torch.split(function(_assemble(flat, mine, len(ranks))), [j.count for j in mine])
        results = [stack[j.place(r)] for r in ranks for j, stack in zip(mine, stacks, strict=True)]
    leaving = [sum(job.size(r) for job in mine) for r in ranks]
    flat = _exchange([empty, *results], leaving, per_owner(order), group, axis)
    returned = dict(zip(order, torch.split(flat, [held[i].numel() for i in order]), strict=True))
    return [returned[i].view(part.shape) for i, part in enumerate(held)]


def _assemble(flat: Tensor, jobs: Sequence[Job], num_ranks: int) -> Tensor:
    """The owner's matrices one after the other, from their elements sorted by source, then by job."""
    counts = [job.count for job in jobs]
    whole = flat.new_empty(sum(counts), *jobs[0].spread.matrix_shape)
    stacks = torch.split(whole, counts)
    pieces = [
        (stack[job.place(source)], job.size(source))
        for source in range(num_ranks)
        for job, stack in zip(jobs, stacks, strict=True)
        if job.is_source(source)
    ]
    for (target, _), piece in zip(
        pieces, torch.split(flat, [size for _, size in pieces]), strict=True
    ):
        target.copy_(piece.view(target.shape))
    return whole


def _exchange(
    tensors: Sequence[Tensor],
    leaving: Sequence[int],
    arriving: Sequence[int],
    group: dist.ProcessGroup,
    axis: Axis,
) -> Tensor:
    """Send all elements to their destinations, so many to each; the received ones, by source."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return exchange_rows(flat.unsqueeze(1), leaving, arriving, group, axis).squeeze(1)
