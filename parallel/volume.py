"""How many bytes a rank sends: pure arithmetic, no torch.

`parallel.traffic` counts with the first functions, `train.volume` predicts a step with all of them.
The conventions are those of ring algorithms, which send the least: with n ranks an all-gather and a
reduce-scatter send (n - 1)/n of the whole from every rank, an all-reduce both. An all-to-all sends
what leaves the rank, a transfer between two ranks what it moves.
"""

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
