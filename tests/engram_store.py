"""Rows of Engram's tables in plain numpy, and the sum of a row's gradients: references for the real ones."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from parallel.engram_worker import SumOver


class PlainStore:
    """Rows r, r + ranks, ... of a table that starts at zero, with row-wise Adagrad."""

    rows_are_independent = True
    sum_over: SumOver | None = None

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        master: type[np.floating] = np.float32,
    ) -> None:
        self.num_rows, self.width, self.master = num_rows, width, master
        local = len(range(rank, num_rows, ranks))
        self.table = np.zeros((local, width), master)
        self.squares = np.zeros(local, master)
        self.updates: list[int] = []
        """Rows of each call of `update`."""

    def gather(self, local: NDArray[np.int64], out: NDArray[np.floating], /) -> None:
        out[:] = self.table[local]

    def update(
        self,
        local: NDArray[np.int64],
        gradients: NDArray[np.floating],
        *,
        step: int,
        learning_rate: float,
        scale: float,
    ) -> None:
        assert len(np.unique(local)) == len(local) == len(gradients)
        self.updates.append(len(local))
        scaled = gradients * self.master(scale)
        self.squares[local] += (scaled**2).mean(axis=1)
        size = self.master(learning_rate) / (np.sqrt(self.squares[local]) + self.master(1e-8))
        self.table[local] -= size[:, None] * scaled

    def prefault(self, local: NDArray[np.int64], /) -> None:
        assert (local < len(self.table)).all()


def tree_sum_at(
    leaves: Mapping[int, NDArray[np.floating]], start: int, level: int
) -> NDArray[np.floating]:
    """Sum of the leaves at the 2^level places from `start`, each half by itself first; one is there."""
    half = 1 << level >> 1
    inside = [place for place in leaves if start <= place < start + 2 * half]
    if level == 0 or len(inside) == 1:
        return leaves[start if level == 0 else inside[0]]
    if all(place < start + half for place in inside):
        return tree_sum_at(leaves, start, level - 1)
    if all(place >= start + half for place in inside):
        return tree_sum_at(leaves, start + half, level - 1)
    left, right = (tree_sum_at(leaves, at, level - 1) for at in (start, start + half))
    total: NDArray[np.floating] = left + right
    return total
