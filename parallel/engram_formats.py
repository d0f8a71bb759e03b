"""How a row of an Engram table is stored: the master's numbers, bf16, or fp8 with a scale for the row.

bf16 and fp8 have no master copy: an update is computed in the master's precision and rounded up or
down at random, in proportion to the distance, so that its mean is exact. Rounding to the nearest would
lose every update smaller than half a step of the format, and these are most of them.

The random bits are a function of the seed, the step, the row of the whole table and the column. So
they do not depend on who owns the row or in which order rows are visited.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from parallel.compiled import compiled, compiled_into_callers, prefetch_rows
from parallel.config import EngramRowDtype

Master = type[np.float32] | type[np.float64]
"""Precision of what goes in and out of a table, and of updates: fp64 in fp64 runs."""

# numba would make `int64 * uint64` a float64: all constants carry their type.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_INFINITY = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SMALLEST_NORMAL = np.uint32(0x3C800000)
"""2^-6 as fp32: the smallest number of e4m3 with its full precision."""
_UNITS = np.float32(2.0**29)
"""2^20 times the steps of 2^-9 in which e4m3 goes on below that."""
_LARGEST_MANTISSA = np.uint32(0x600000)
"""Of 448 = 1.75 x 2^8, the largest number of e4m3, as fp32."""


class Rounding(NamedTuple):
    """What the random bits of an update depend on, except for row and column."""

    key: np.uint64
    """Of the seed and the step."""
    rank: int
    ranks: int
    """Local row r is row `r * ranks + rank` of the whole table."""


def stored_type(dtype: EngramRowDtype, master: Master) -> type[np.generic]:
    """Numpy's type of a stored number: codes are unsigned integers for bf16 and fp8."""
    return {"fp32": master, "bf16": np.uint16, "fp8": np.uint8}[dtype]


def _e4m3_values() -> NDArray[np.float32]:
    """The 256 numbers of e4m3 (without infinities, as `torch.float8_e4m3fn`), by code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9
    )
    magnitude[code & 127 == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


_E4M3 = _e4m3_values()


@compiled
def _mix(number: np.uint64) -> np.uint64:
    """One draw of splitmix64 (Steele, Lea, Flood 2014): every bit depends on all bits of `number`."""
    number = number + _GOLDEN
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@compiled
def _step_key(seed: int, step: int) -> np.uint64:
    return _mix(_mix(np.uint64(seed)) ^ np.uint64(step))


def rounding_of(*, seed: int, step: int, rank: int, ranks: int) -> Rounding:
    """What the random bits of one update depend on, at the owner `rank` of `ranks`."""
    # numba returns a plain integer, which would come back as a signed one.
    return Rounding(np.uint64(_step_key(seed, step)), rank, ranks)


@compiled
def _row_key(rounding: Rounding, row: int) -> np.uint32:
    whole = np.uint64(row) * np.uint64(rounding.ranks) + np.uint64(rounding.rank)
    return np.uint32(_mix(rounding.key ^ whole) >> np.uint64(32))


@compiled
def _noise(row_key: np.uint32, column: int) -> np.uint32:
    """32 random bits by lowbias32 (Wellons 2018), whose 32-bit products vectorize."""
    bits = np.uint32(row_key + np.uint32(column) * np.uint32(0x9E3779B9))
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
    bits = np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@compiled
def bf16_code(value: np.float32, noise: np.uint32) -> np.uint16:
    """Round to bf16: up if the 16 bits that are cut off, plus `noise` < 2^16, carry.

    With uniform noise the mean is `value`, and numbers of bf16 stay as they are. With noise 2^15 - 1
    plus the last bit that is kept, this is rounding to the nearest, ties to even.
    """
    bits = np.float32(value).view(np.uint32)
    if (bits & _INFINITY) == _INFINITY:
        quiet = np.uint32(0x40) if (bits & _MAGNITUDE) > _INFINITY else np.uint32(0)
        return np.uint16((bits >> np.uint32(16)) | quiet)
    return np.uint16(np.uint32(bits + noise) >> np.uint32(16))


@compiled
def e4m3_code(value: np.float32, noise: np.uint32) -> np.uint8:
    """Round to e4m3: away from 0 if the 20 bits that are cut off, plus `noise` < 2^20, carry.

    See `bf16_code`. Numbers beyond 448 become 448; infinities become nan, as e4m3 has none. Below
    2^-6 what is less than 2^-20 of a step is cut off, as the noise has no bits for it.
    """
    bits = np.float32(value).view(np.uint32)
    sign, magnitude = np.uint32((bits >> np.uint32(24)) & np.uint32(0x80)), bits & _MAGNITUDE
    if magnitude >= _INFINITY:
        return np.uint8(sign | np.uint32(0x7F))
    if magnitude >= _SMALLEST_NORMAL:
        code = np.uint32((magnitude + noise) >> np.uint32(20)) - np.uint32(120 << 3)
    else:
        code = np.uint32(np.uint32(np.abs(value) * _UNITS) + noise) >> np.uint32(20)
    return np.uint8(sign | np.uint32(min(code, np.uint32(0x7E))))


@compiled
def _scale_exponent(values: Float[np.ndarray, "width"]) -> np.uint32:
    """Exponent, as fp32 stores it, of the smallest power of 2 by which all values are within 448."""
    peak = np.uint32(0)
    for column in range(values.shape[0]):
        magnitude = np.float32(values[column]).view(np.uint32) & _MAGNITUDE
        if magnitude < _INFINITY:
            peak = max(peak, magnitude)
    up = np.uint32(1) if (peak & np.uint32(0x7FFFFF)) > _LARGEST_MANTISSA else np.uint32(0)
    exponent = np.uint32((peak >> np.uint32(23)) + up)
    return np.uint32(exponent - np.uint32(8)) if exponent > np.uint32(9) else np.uint32(1)


@compiled_into_callers
def load_row(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    row: int,
    values: Float[np.ndarray, "width"],
) -> None:
    """Write a stored row into `values`.

    Args:
        rows: `[rows width]` of the master's type, codes of bf16 (uint16) or of e4m3 (uint8).
        scales: of the rows of e4m3; None otherwise, which numba knows when it compiles.
        row: which.
        values: of the master's type.
    """
    if scales is not None:
        for column in range(values.shape[0]):
            values[column] = _E4M3[np.uint8(rows[row, column])] * scales[row]
    elif rows.itemsize == 2:
        for column in range(values.shape[0]):
            bits = np.uint32(rows[row, column]) << np.uint32(16)
            values[column] = np.uint32(bits).view(np.float32)
    else:
        for column in range(values.shape[0]):
            values[column] = rows[row, column]


@compiled_into_callers
def store_row(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    row: int,
    values: Float[np.ndarray, "width"],
    rounding: Rounding,
) -> None:
    """Write `values` as a stored row, rounded at random where the format has fewer bits.

    The scale of a row of e4m3 is a power of 2, so that columns that do not change keep their value
    exactly, in all but the few updates in which the largest of the row passes a power of 2.

    Args:
        rows: see `load_row`.
        scales: see `load_row`.
        row: which.
        values: of the master's type; fp64 becomes fp32 first if the format has fewer bits.
        rounding: of this update.
    """
    if scales is not None:
        key, exponent = _row_key(rounding, row), _scale_exponent(values)
        scales[row] = np.uint32(exponent << np.uint32(23)).view(np.float32)
        inverse = np.uint32((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)
        for column in range(values.shape[0]):
            noise = np.uint32(_noise(key, column) >> np.uint32(12))
            rows[row, column] = e4m3_code(np.float32(values[column]) * inverse, noise)
    elif rows.itemsize == 2:
        key = _row_key(rounding, row)
        for column in range(values.shape[0]):
            noise = np.uint32(_noise(key, column) >> np.uint32(16))
            rows[row, column] = bf16_code(np.float32(values[column]), noise)
    else:
        for column in range(values.shape[0]):
            rows[row, column] = values[column]


@compiled_into_callers
def subtract_from_row(  # noqa: PLR0917 - numba has no keyword-only arguments
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    row: int,
    factor: np.floating[Any],
    change: Float[np.ndarray, "width"],
    room: Float[np.ndarray, "width"],
    rounding: Rounding,
) -> None:
    """Subtract `factor * change` from a stored row where it lies.

    Args:
        rows: see `load_row`.
        scales: see `load_row`.
        row: which.
        factor: of the master's type.
        change: of the master's type.
        room: like `change`; overwritten.
        rounding: see `store_row`.
    """
    if scales is not None or rows.itemsize == 2:
        load_row(rows, scales, row, room)
        for column in range(change.shape[0]):
            room[column] -= factor * change[column]
        store_row(rows, scales, row, room, rounding)
    else:
        for column in range(change.shape[0]):
            rows[row, column] -= factor * change[column]


@compiled
def gather_rows(
    rows: NDArray[Any],
    scales: Float[np.ndarray, "rows"] | None,
    local: Int[np.ndarray, "touched"],
    out: Float[np.ndarray, "touched width"],
) -> None:
    """Write stored rows, in the order of `local`, into `out`; see `load_row`."""
    for place in range(local.shape[0]):
        prefetch_rows(rows, local, place)
        load_row(rows, scales, local[place], out[place])
