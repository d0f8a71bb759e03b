"""Optimizers of the rows of an Engram table that a step touches; the loops are in `engram_kernels`.

All follow the row of the table only while it is touched: a row without a gradient keeps its values and
its states as they are, at no cost. There is no weight decay. The gradient of a row is its sum over all
tokens; g below is that times `scale`.

The formulas are in the docstrings, in the order in which they are rounded, in the master's precision
unless they say otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from parallel import engram_kernels
from parallel.engram_formats import Master, Rounding

NORMALIZATIONS = 11
"""K of algorithm 1."""
_THRESHOLD = 1e-3
"""tau of algorithm 1."""

SumOver = Callable[[Int[np.ndarray, "numbers"]], Int[np.ndarray, "numbers"]]
"""Sum of an int64 array over all owners of a table; all call it together."""


class Update(NamedTuple):
    """What a step brings to the rows of one owner."""

    local: Int[np.ndarray, "touched"]
    """Rows by their place at this owner, each once."""
    gradients: Float[np.ndarray, "touched width"]
    learning_rate: float
    scale: float
    rounding: Rounding


@runtime_checkable
class RowOptimizer(Protocol):
    """Updates rows where they lie."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether the update of a row depends on that row alone, so that rows may come in parts."""
        ...

    def states(self, width: int, master: Master) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name, shape after the first dim, and type of what is kept for each row; starts as zeros."""
        ...

    def update(
        self, arrays: Mapping[str, NDArray[Any]], update: Update, sum_over: SumOver | None
    ) -> None:
        """Change `rows` and its states.

        Args:
            arrays: `rows`, `scale` for fp8, and the states, by name.
            update: rows, gradients and what else belongs to the step.
            sum_over: None with one owner.
        """
        ...


@dataclass(frozen=True)
class LazyAdam:
    """Adam whose moments and bias corrections follow a row's own updates.

        m <- m + (1 - beta1) (g - m)        v <- beta2 v + (1 - beta2) g^2        t <- t + 1
        w <- w - lr / (1 - beta1^t) [m / (sqrt(v) / sqrt(1 - beta2^t) + eps)]

    t counts the updates of this row (the corrections are computed in fp64). With every row touched in
    every step this is `torch.optim.AdamW` without decay. Else it deviates from it: dense Adam goes on
    to move a row by its old momentum, and lets m and v decay, in steps that do not touch the row.
    """

    beta1: float
    beta2: float
    eps: float

    rows_are_independent: ClassVar[bool] = True

    def states(self, width: int, master: Master) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`exp_avg` (m), `exp_avg_sq` (v) and `num_updates` (t)."""
        moment = ((width,), master)
        return {"exp_avg": moment, "exp_avg_sq": moment, "num_updates": ((), np.int32)}

    def update(
        self, arrays: Mapping[str, NDArray[Any]], update: Update, sum_over: SumOver | None
    ) -> None:
        """Without communication."""
        number = update.gradients.dtype.type
        one_minus = number(1 - self.beta1), number(1 - self.beta2)
        engram_kernels.adam(
            arrays["rows"],
            arrays.get("scale"),
            arrays["exp_avg"],
            arrays["exp_avg_sq"],
            arrays["num_updates"],
            update.local,
            update.gradients,
            number(update.scale),
            (one_minus[0], number(self.beta2), one_minus[1], number(self.eps)),
            update.learning_rate,
            bias_corrections(self.beta1, self.beta2),
            update.rounding,
        )


@dataclass(frozen=True)
class RowAdagrad:
    """Adagrad with one number for a row, the sum of the mean squares of its gradients.

        s <- s + scale^2 (G_1^2 + ... + G_n^2) / n        w <- w - lr scale / (sqrt(s) + eps) G

    with g = scale G. The squares add up in eight sums, column by column in turn (the last n mod 8 columns
    in the first sum), and the sums in halves, the second to the first, until one is left. It is row-wise
    Adagrad as DLRM and FBGEMM have it. A row of n numbers needs 1/n of the state of Adagrad, 1/2n of Adam's.
    """

    eps: float

    rows_are_independent: ClassVar[bool] = True

    def states(self, width: int, master: Master) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`sum_of_squares` (s)."""
        return {"sum_of_squares": ((), master)}

    def update(
        self, arrays: Mapping[str, NDArray[Any]], update: Update, sum_over: SumOver | None
    ) -> None:
        """Without communication."""
        number = update.gradients.dtype.type
        engram_kernels.adagrad(
            arrays["rows"],
            arrays.get("scale"),
            arrays["sum_of_squares"],
            update.local,
            update.gradients,
            number(update.scale**2),
            number(update.learning_rate * update.scale),
            number(self.eps),
            update.rounding,
        )


@dataclass(frozen=True)
class SinkhornMomentum:
    """Sinkhorn-balanced momentum of DeepSeek-V4.1 (algorithm 1) over the rows that a step touches.

        M <- beta M + (1 - beta) g        D = beta M + (1 - beta) g
        w <- w - gamma lr sqrt(n) U       U = diag(r) D diag(c), balanced over the touched rows

    A row of U has norm 1, or 0 if that of D is at most 10^-3 of the mean, and all columns have nearly the
    same norm: rows and columns are divided by their norms in turn, K = 11 times, rows first and last.
    n is the width. With every row touched it is `train.optim.sinkhorn_momentum`. Else it deviates from
    that: a row that is not touched keeps its momentum undecayed, and its weights do not move; and the
    mean and the columns' norms are those of the touched rows.

    Communication: six sums over the owners of a table, of 322 numbers and of n (five times), in which
    every owner takes part in every step. The sums are of integers, so that they do not depend on who
    owns which rows: of norms in units of 2^-32 (relative), and of each row's shares per column in units
    of 2^-62 times the number of rows. A column that has less in every row counts as empty.
    """

    momentum: float
    update_rms: float

    rows_are_independent: ClassVar[bool] = False

    def states(self, width: int, master: Master) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`momentum_buffer` (M)."""
        return {"momentum_buffer": ((width,), master)}

    def update(
        self, arrays: Mapping[str, NDArray[Any]], update: Update, sum_over: SumOver | None
    ) -> None:
        """With a sum over all owners for every pass over the columns."""
        assert sum_over or update.rounding.ranks == 1, (
            "there are other owners, and no sum over them"
        )
        number, width = update.gradients.dtype.type, update.gradients.shape[1]
        direction, norms = np.empty_like(update.gradients), np.empty(len(update.local))
        histogram = np.zeros(engram_kernels.HISTOGRAM, np.int64)
        engram_kernels.advance_momentum(
            arrays["momentum_buffer"],
            update.local,
            update.gradients,
            number(update.scale),
            (number(self.momentum), number(1 - self.momentum)),
            direction,
            norms,
            histogram,
        )
        mean, count = mean_norm(_sum(histogram, sum_over))
        if mean == 0:
            return
        # Squares of tiny gradients would underflow; only ratios matter, and a power of 2 is exact.
        unit = number(2.0 ** -np.round(np.log2(mean)))
        direction *= np.where(norms > _THRESHOLD * mean, unit, number(0))[:, None]
        columns = np.ones(width)
        for _ in range(NORMALIZATIONS // 2):
            shares, bits = np.zeros(width, np.int64), 62 - count.bit_length()
            engram_kernels.add_shares(direction, columns.astype(number), 2.0**bits, shares)
            shares = _sum(shares, sum_over)
            np.divide(columns * 2.0**bits, shares, out=columns, where=shares > 0)
            columns[shares == 0] = 0
        engram_kernels.apply_balanced(
            arrays["rows"],
            arrays.get("scale"),
            update.local,
            direction,
            columns.astype(number),
            number(self.update_rms * update.learning_rate * width**0.5),
            update.rounding,
        )


def _sum(
    numbers: Int[np.ndarray, "numbers"], sum_over: SumOver | None
) -> Int[np.ndarray, "numbers"]:
    return sum_over(numbers) if sum_over else numbers


def mean_norm(histogram: Int[np.ndarray, "exponents"]) -> tuple[float, int]:
    """Mean norm of all touched rows, and their number, from what `advance_momentum` counts."""
    *mantissas, count = histogram.tolist()
    first = -engram_kernels.EXPONENTS - 32
    total = sum(mantissa * 2.0 ** (first + place) for place, mantissa in enumerate(mantissas))
    return total / max(count, 1), count


@lru_cache(maxsize=4)
def bias_corrections(beta1: float, beta2: float) -> Float[np.ndarray, "updates 2"]:
    """`1 / (1 - beta1^t)` and `1 / sqrt(1 - beta2^t)` for t = 1, 2, ... until both are 1 in fp64.

    A table, since powers would be half the cost of an update, and differ between libraries.
    """
    largest = max(beta1, beta2)
    last = ceil(-54 * log(2) / log(largest)) if largest > 0 else 1
    updates = range(1, last + 1)
    return np.array([(1 / (1 - beta1**t), (1 - beta2**t) ** -0.5) for t in updates])
