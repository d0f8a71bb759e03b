"""The loops of `engram_optimizers` over the rows that a step touches, each one pass in a thread.

Arguments: `local` are the touched rows; `rows` and `scales` the table as `engram_formats.load_row` has
it; gradients are multiplied by `scale`. Plain numbers have the type of the gradients, unless they are
said to be float.
"""

# ruff: noqa: PLR0917 - numba takes arrays and numbers, and has no keyword-only arguments

from math import frexp
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from parallel.compiled import compiled, compiled_into_callers, prefetch_rows
from parallel.engram_formats import Rounding, subtract_from_row

EXPONENTS = 160
"""Norms from 2^-160 to 2^160 are told apart."""
HISTOGRAM = 2 * EXPONENTS + 2


@compiled
def adam(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    exp_avg: Float[np.ndarray, "rows width"],
    exp_avg_sq: Float[np.ndarray, "rows width"],
    num_updates: Int[np.ndarray, "rows"],
    local: Int[np.ndarray, "touched"],
    gradients: Float[np.ndarray, "touched width"],
    scale: np.floating[Any],
    constants: tuple[np.floating[Any], ...],
    learning_rate: float,
    corrections: Float[np.ndarray, "updates 2"],
    rounding: Rounding,
) -> None:
    """See `LazyAdam`; `constants` are 1 - beta1, beta2, 1 - beta2 and eps."""
    number, (new1, beta2, new2, eps) = gradients.dtype.type, constants
    width = gradients.shape[1]
    change, room = np.empty(width, gradients.dtype), np.empty(width, gradients.dtype)
    for place in range(local.shape[0]):
        prefetch_rows(rows, local, place)
        prefetch_rows(exp_avg, local, place)
        prefetch_rows(exp_avg_sq, local, place)
        prefetch_rows(num_updates, local, place)
        row = local[place]
        num_updates[row] += 1
        count = min(num_updates[row], corrections.shape[0]) - 1
        rate = number(learning_rate * corrections[count, 0])
        root = number(corrections[count, 1])
        for column in range(width):
            gradient = scale * gradients[place, column]
            mean, square = exp_avg[row, column], exp_avg_sq[row, column]
            mean += new1 * (gradient - mean)
            square = beta2 * square + new2 * (gradient * gradient)
            exp_avg[row, column], exp_avg_sq[row, column] = mean, square
            change[column] = mean / (np.sqrt(square) * root + eps)
        subtract_from_row(rows, scales, row, rate, change, room, rounding)


@compiled
def adagrad(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    sum_of_squares: Float[np.ndarray, "rows"],
    local: Int[np.ndarray, "touched"],
    gradients: Float[np.ndarray, "touched width"],
    squared_scale: np.floating[Any],
    rate: np.floating[Any],
    eps: np.floating[Any],
    rounding: Rounding,
) -> None:
    """See `RowAdagrad`; `rate` is that of learning times the gradients' scale."""
    number, width = gradients.dtype.type, gradients.shape[1]
    room = np.empty(width, gradients.dtype)
    for place in range(local.shape[0]):
        prefetch_rows(rows, local, place)
        prefetch_rows(sum_of_squares, local, place)
        row, gradient = local[place], gradients[place]
        sum_of_squares[row] += squared_scale * _sum_of_squares(gradient) / number(width)
        factor = rate / (np.sqrt(sum_of_squares[row]) + eps)
        subtract_from_row(rows, scales, row, factor, gradient, room, rounding)


@compiled_into_callers
def _sum_of_squares(values: Float[np.ndarray, "width"]) -> np.floating[Any]:
    """In eight sums that the processor adds to at once, for one sum waits for every addition."""
    zero: np.floating[Any] = values.dtype.type(0)
    a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
    width = values.shape[0]
    whole = width - width % 8
    for column in range(0, whole, 8):
        a += values[column] * values[column]
        b += values[column + 1] * values[column + 1]
        c += values[column + 2] * values[column + 2]
        d += values[column + 3] * values[column + 3]
        e += values[column + 4] * values[column + 4]
        f += values[column + 5] * values[column + 5]
        g += values[column + 6] * values[column + 6]
        h += values[column + 7] * values[column + 7]
    for column in range(whole, width):
        a += values[column] * values[column]
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


@compiled
def advance_momentum(
    momentum: Float[np.ndarray, "rows width"],
    local: Int[np.ndarray, "touched"],
    gradients: Float[np.ndarray, "touched width"],
    scale: np.floating[Any],
    constants: tuple[np.floating[Any], ...],
    direction: Float[np.ndarray, "touched width"],
    norms: Float[np.ndarray, "touched"],
    histogram: Int[np.ndarray, "exponents"],
) -> None:
    """First pass of `SinkhornMomentum`; `constants` are beta and 1 - beta.

    Writes D and the L2 norms of its rows, in fp64, and adds the norms up by their exponent, as integers:
    `histogram[e + 160]` is the sum of their mantissas in units of 2^-32, the last entry their number.
    """
    old, new = constants
    for place in range(local.shape[0]):
        prefetch_rows(momentum, local, place)
        row, total = local[place], 0.0
        for column in range(gradients.shape[1]):
            gradient = scale * gradients[place, column]
            value = old * momentum[row, column] + new * gradient
            momentum[row, column] = value
            value = old * value + new * gradient
            direction[place, column] = value
            total += np.float64(value) * np.float64(value)
        norms[place] = np.sqrt(total)
        mantissa, exponent = frexp(norms[place])
        if -EXPONENTS <= exponent <= EXPONENTS:
            histogram[exponent + EXPONENTS] += np.int64(mantissa * 2.0**32)
        histogram[-1] += 1


@compiled
def add_shares(
    direction: Float[np.ndarray, "touched width"],
    columns: Float[np.ndarray, "width"],
    unit: float,
    shares: Int[np.ndarray, "width"],
) -> None:
    """Divide rows by their norm, and add the squares of each column up, as integers of `1 / unit`.

    `columns` are the squares of the factors of the columns so far. A row's squares, the shares of the
    columns in it, add up to 1.
    """
    for place in range(direction.shape[0]):
        factor = _inverse_square(direction, place, columns)
        for column in range(direction.shape[1]):
            square = direction[place, column] * direction[place, column] * columns[column]
            shares[column] += np.int64(np.float64(square * factor) * unit)


@compiled
def apply_balanced(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    local: Int[np.ndarray, "touched"],
    direction: Float[np.ndarray, "touched width"],
    columns: Float[np.ndarray, "width"],
    rate: np.floating[Any],
    rounding: Rounding,
) -> None:
    """Last pass of `SinkhornMomentum`: rows are normalized once more, and move by `rate` times that."""
    roots, width = np.sqrt(columns), direction.shape[1]
    change, room = np.empty(width, direction.dtype), np.empty(width, direction.dtype)
    for place in range(local.shape[0]):
        prefetch_rows(rows, local, place)
        factor = rate * np.sqrt(_inverse_square(direction, place, columns))
        for column in range(width):
            change[column] = direction[place, column] * roots[column]
        subtract_from_row(rows, scales, local[place], factor, change, room, rounding)


@compiled_into_callers
def _inverse_square(
    direction: Float[np.ndarray, "touched width"], place: int, columns: Float[np.ndarray, "width"]
) -> np.floating[Any]:
    """1 / squared norm of a row whose columns are scaled, and 0 for an empty row."""
    number = direction.dtype.type
    total: np.floating[Any] = number(0)
    for column in range(direction.shape[1]):
        total += direction[place, column] * direction[place, column] * columns[column]
    inverse: np.floating[Any] = number(1) / total if total > number(0) else number(0)
    return inverse
