"""How many bytes a rank sends: pure arithmetic, no torch.

`parallel.traffic` counts with the first functions, `train.volume` predicts a step with all of them.
The conventions are those of ring algorithms, which send the least: with n ranks an all-gather and a
reduce-scatter send (n - 1)/n of the whole from every rank, an all-reduce both. An all-to-all sends
what leaves the rank, a transfer between two ranks what it moves.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Axis = Literal["dp", "edp", "ep", "tp", "cp", "pp", "world"]
AXES: tuple[Axis, ...] = get_args(Axis)


def gather_bytes(whole: int, ranks: int) -> float:
    """Sent by each rank in an all-gather or a reduce-scatter.

    Args:
        whole: bytes of the result of the one, of a summand of the other.
        ranks: that take part.
    """
    return whole * (ranks - 1) / ranks


def sum_bytes(summand: int, ranks: int) -> float:
    """Sent by each rank in an all-reduce."""
    return 2 * gather_bytes(summand, ranks)


@dataclass(frozen=True, slots=True)
class Sharded:
    """How FSDP2 holds a parameter: some copies, each cut along dim 0."""

    shape: tuple[int, ...]
    """As tensor and expert parallelism have cut it."""
    ranks: int
    """That share a copy."""
    copies: int

    @property
    def shard(self) -> int:
        """Elements on a rank, the same on all: late shards are padded."""
        return math.ceil(self.shape[0] / self.ranks) * math.prod(self.shape[1:])

    def gathered(self, itemsize: int) -> float:
        """Sent by each rank to gather the parameter once."""
        return gather_bytes(self.ranks * self.shard * itemsize, self.ranks)

    def summed(self, itemsize: int) -> float:
        """Sent by each rank to sum its gradient once, over the ranks and then over the copies."""
        shard = self.shard * itemsize
        return gather_bytes(self.ranks * shard, self.ranks) + sum_bytes(shard, self.copies)
