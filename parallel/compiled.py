"""Loops that numba compiles: they run without the interpreter's lock, so that other threads go on."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")

_CACHE_LINE = 64
_TOGETHER, _FAR, _NEAR = 4, 12, 4
"""Rows whose first cache line is asked for at once, how many rows before they are needed, and how many
rows before the rest of a row is asked for."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call with new argument types; the machine code is kept beside the source.

    Without fast-math: every operation is rounded as it is written, in the order in which it is
    written, so that results do not depend on the processor and can be compared bit by bit with those
    of torch. A division by zero gives what IEEE 754 has for it: a loop that may raise an error works on one
    number at a time.

    Kept code is renewed when the file of the function changes, not when that of a function it calls
    does: who edits a function that other files call removes `parallel/__pycache__/*.nbi`.
    """
    # Tests wrap functions to check shapes; numba needs the bare one.
    kernel: Callable[P, R] = njit(nogil=True, cache=True, error_model="numpy")(
        inspect.unwrap(function)
    )
    return kernel


def compiled_into_callers(function: Callable[P, R]) -> Callable[P, R]:
    """`compiled`, for what a loop does with each row: the loop contains it, and calls nothing.

    A call with arrays is some hundred instructions: left to itself the compiler keeps it, and the
    processor then sees too few rows at a time to wait for their memory together.
    """
    kernel: Callable[P, R] = njit(nogil=True, cache=True, error_model="numpy", forceinline=True)(
        inspect.unwrap(function)
    )
    return kernel


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_typing: Any, _address: Any) -> Any:  # noqa: ANN401 - numba's types
    """Ask for the cache line at an address; no fault if nothing is mapped there."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # To be read, to be kept in all caches, data.
        hints = [number(0), number(3), number(1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *hints])
        return context.get_dummy_value()

    return types.none(types.uintp), generate


@compiled_into_callers
def prefetch_rows(array: NDArray[Any], rows: NDArray[np.int64], place: int) -> None:
    """Ask for rows of a contiguous array before a loop needs them.

    The loop works on `rows[0]`, `rows[1]` and on, and calls this at every place. Rows that lie far apart
    cost the time of the memory otherwise; the processor cannot guess them.

    The first request for a row has its address translated, which may take as long as the memory itself.
    Several translations run at a time if their requests follow one another closely, so those of some
    rows come together. The rest of a row is asked for later, row by row: the processor notes few
    requests, and waits with the arithmetic when there are more.
    """
    size, start = np.uintp(array.strides[0]), np.uintp(array.ctypes.data)
    if place % _TOGETHER == 0:
        first = place + _FAR
        for later in range(first, min(first + _TOGETHER, rows.shape[0])):
            _prefetch(start + np.uintp(rows[later]) * size)
    if place + _NEAR < rows.shape[0]:
        row = start + np.uintp(rows[place + _NEAR]) * size
        for offset in range(_CACHE_LINE, array.strides[0], _CACHE_LINE):
            _prefetch(row + np.uintp(offset))
