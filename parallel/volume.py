"""How many bytes a rank sends: pure arithmetic, no torch.

`parallel.traffic` counts with the first functions, `train.volume` predicts a step with all of them.
The conventions are those of ring algorithms, which send the least: with n ranks an all-gather and a
reduce-scatter send (n - 1)/n of the whole from every rank, an all-reduce both. An all-to-all sends
what leaves the rank, a transfer between two ranks what it moves.
"""

import math
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How FSDP2 holds parameters: `copies` times, each cut along dim 0 over `ranks`."""

    ranks: int
    copies: int
    itemsize: int
    """Bytes of an element that is gathered."""
    sum_itemsize: int
    """Bytes of an element of a gradient that is summed."""

    def bytes(self, shapes: Iterable[Sequence[int]], gathers: int) -> float:
        """Sent by each rank in an optimizer step: the gathers, and the sum of the gradients.

        Args:
            shapes: of the parameters, as tensor and expert parallelism have cut them.
            gathers: how often they are gathered.
        """
        # Every rank sends equally much: late shards are padded.
        shard = sum(math.ceil(shape[0] / self.ranks) * math.prod(shape[1:]) for shape in shapes)
        whole = shard * self.ranks
        gathered = gathers * gather_bytes(whole * self.itemsize, self.ranks)
        summed = gather_bytes(whole * self.sum_itemsize, self.ranks)
        return gathered + summed + sum_bytes(shard * self.sum_itemsize, self.copies)
