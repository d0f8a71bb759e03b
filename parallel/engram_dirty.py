"""Which rows of a rank's Engram table changed since they were last saved: one bit a row.

A `RowStore` marks the rows of each update in it, `engram_saves` takes them. A scan reads the bits
64 at a time, so a table of 10^8 rows costs half a millisecond when nothing is dirty.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt64

from parallel.compiled import compiled

_WORD = 64


class DirtyRows:
    """A set of local rows as a packed bitmap; not to be used by two threads at once.

    Args:
        num_rows: rows of the rank.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._words = np.zeros(-(-num_rows // _WORD), dtype=np.uint64)

    def mark(self, local: Int[np.ndarray, "marked"]) -> None:
        """Add rows, by their local numbers; runs without the interpreter's lock."""
        _mark(self._words, local)

    def __len__(self) -> int:
        return int(_count(self._words))

    def rows(self) -> Int64[np.ndarray, "dirty"]:
        """The rows of the set, in ascending order."""
        rows = np.empty(len(self), dtype=np.int64)
        _list(self._words, rows)
        return rows

    def take(self) -> Int64[np.ndarray, "dirty"]:
        """The rows of the set; afterwards it is empty."""
        rows = self.rows()
        self._words[:] = 0
        return rows


@compiled
def _mark(words: UInt64[np.ndarray, "words"], local: Int[np.ndarray, "marked"]) -> None:
    for row in local:
        words[row >> 6] |= np.uint64(1) << np.uint64(row & 63)


@compiled
def _count(words: UInt64[np.ndarray, "words"]) -> int:
    total = 0
    for word in words:
        while word:
            word &= word - np.uint64(1)  # noqa: PLW2901 - without its lowest bit
            total += 1
    return total


@compiled
def _list(words: UInt64[np.ndarray, "words"], rows: Int64[np.ndarray, "dirty"]) -> None:
    place = 0
    for number in range(len(words)):
        word = words[number]
        bit = 0
        while word:
            if word & np.uint64(1):
                rows[place] = number * 64 + bit
                place += 1
            word >>= np.uint64(1)
            bit += 1
