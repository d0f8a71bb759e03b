"""Whole matrices for computations that need them: each sharded matrix visits one rank, its owner.

`train.optim.muon` calls this. The matrices stay sharded by rows between the calls; no rank ever
holds more whole ones than it works on.
"""

import heapq
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import exchange_rows


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


def shard_rows(num_rows: int, num_ranks: int) -> list[range]:
    """Rows of a parameter that each rank of a group holds: `torch.chunk`, as FSDP2 cuts it."""
    size = math.ceil(num_rows / num_ranks)
    return [range(num_rows)[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def map_whole_matrices(
    function: Callable[[Tensor], Tensor],
    shards: Sequence[Tensor],
    counts: Sequence[Sequence[int]],
    owners: Sequence[int],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Apply `function` to matrices of one shape that are sharded by rows; returns this rank's rows.

    Communication: two all-to-alls over `group`, rows to their owners and results back. A rank sends
    its rows of all matrices that it does not own, and gets as much back: over the group, twice
    (1 - 1/ranks) of the matrices' bytes, as a reduce-scatter and an all-gather would.

    Args:
        function: `[own matrices, rows, columns]` to the same shape; not called with none.
        shards: this rank's rows of each matrix, `[rows here, columns]`; may have none.
        counts: rows of each matrix on each rank of the group, the same on all ranks.
        owners: rank of the group that computes each matrix.
        group: the ranks over which the matrices are sharded.
    """
    rank, ranks = group.rank(), range(group.size())
    order = sorted(range(len(shards)), key=lambda i: owners[i])
    mine = [i for i in order if owners[i] == rank]
    leaving = [sum(counts[i][rank] for i in order if owners[i] == r) for r in ranks]
    arriving = [sum(counts[i][r] for i in mine) for r in ranks]
    rows = exchange_rows(torch.cat([shards[i] for i in order]), leaving, arriving, group)
    if mine:
        # They come sorted by source, then by matrix.
        parts = torch.split(rows, [counts[i][r] for r in ranks for i in mine])
        whole = torch.stack([torch.cat(parts[k :: len(mine)]) for k in range(len(mine))])
        cut = [
            torch.split(matrix, list(counts[i]))
            for matrix, i in zip(function(whole), mine, strict=True)
        ]
        rows = torch.cat([parts[r] for r in ranks for parts in cut])
    rows = exchange_rows(rows, arriving, leaving, group)
    returned = dict(zip(order, torch.split(rows, [counts[i][rank] for i in order]), strict=True))
    return [returned[i] for i in range(len(shards))]
