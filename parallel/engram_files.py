"""A file of Engram's table rows: what one rank held, at one time, of the tables of its layers.

`engram_write` writes such files, `engram_saves` reads them back, `engram_reader` looks rows up in
them. A file is a safetensors file. For each layer it has the tensors `layers.<layer>.<array>`, one for each
array of the store (rows and optimizer states): of all rows that the rank held (`FileEntry.held`), or
of those in the ascending tensor `layers.<layer>.index`. Rows are numbered within the LAYER's table,
so any group, with any layers, can read what it needs.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from numpy.typing import NDArray

from parallel.compiled import compiled

Arrays = Mapping[str, NDArray[Any]]
"""Of a store: name -> array whose first dim is the rank's rows."""
Numbers = Int64[np.ndarray, "numbers"]

INDEX = "index"
"""Tensor beside the arrays that says which rows they are of."""
DTYPE_CODES = {
    np.dtype(f"{kind}{bits}"): f"{code}{bits}"
    for kind, code in {"float": "F", "int": "I", "uint": "U"}.items()
    for bits in ((32, 64) if kind == "float" else (8, 16, 32, 64))
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
CHUNK_BYTES = 1 << 22
_HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class TablePlace:
    """A layer's table as a part of the flat table of its pipeline stage's ranks."""

    layer: int
    first_row: int
    """Its flat number."""
    num_rows: int

    def held(self, rank: int, ranks: int) -> range:
        """Rows of the layer on a rank of the group: those with flat number = rank modulo ranks."""
        return range((rank - self.first_row) % ranks, self.num_rows, ranks)

    def local(self, row: int, ranks: int) -> int:
        """Local number of a row of the layer on the rank that holds it."""
        return (self.first_row + row) // ranks


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says about a file."""

    name: str
    size: int
    sha256: str
    rows: int
    """Over all layers."""
    held: dict[int, tuple[int, int, int]]
    """Rows of each layer that it has, or, with an index, may have: start, stop, step."""

    def rows_of(self, layer: int) -> range:
        """Those of a layer."""
        return range(*self.held.get(layer, (0, 0, 1)))


def common_rows(one: range, other: range) -> range:
    """The numbers that two ascending ranges share, by the Chinese remainder theorem."""
    step, gcd = math.lcm(one.step, other.step), math.gcd(one.step, other.step)
    apart = other.start - one.start
    if apart % gcd:
        return range(0)
    inverse = pow(one.step // gcd, -1, other.step // gcd)
    first = one.start + one.step * (apart // gcd * inverse % (other.step // gcd))
    first += max(0, math.ceil((other.start - first) / step)) * step
    return range(first, min(one.stop, other.stop), step)


def places(rows: range, within: range) -> slice:
    """Where the numbers of a range stand in one that holds them all."""
    first, step = (rows.start - within.start) // within.step, rows.step // within.step
    return slice(first, first + (len(rows) - 1) * step + 1, step)


def check_file(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, None if it is the one that was written: reads all of it."""
    path = folder / entry.name
    if not path.is_file():
        return f"{path}: missing"
    if (size := path.stat().st_size) != entry.size:
        return f"{path}: has {size} bytes, not {entry.size}"
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry.sha256:
        return f"{path}: damaged: sha256 {digest.hexdigest()}, not {entry.sha256}"
    return None


class RowFile:
    """A file, mapped into memory: only what is asked for is read.

    Args:
        folder: where it is.
        entry: of the file, which `check_file` found as it was written.
    """

    def __init__(self, folder: Path, entry: FileEntry) -> None:
        self._path, self._entry = folder / entry.name, entry

    @cached_property
    def _content(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Header and data."""
        mapped: NDArray[np.uint8] = np.asarray(np.memmap(self._path, dtype=np.uint8, mode="r"))
        begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        return json.loads(mapped[8:begin].tobytes()), mapped[begin:]

    def array(self, layer: int, name: str) -> NDArray[Any]:
        """An array of a layer, or its index."""
        header, data = self._content
        info = header[f"layers.{layer}.{name}"]
        begin, end = info["data_offsets"]
        return data[begin:end].view(_DTYPES[info["dtype"]]).reshape(info["shape"])

    def index(self, layer: int) -> Numbers | None:
        """Rows of the layer that are here, ascending; None: all that the rank held."""
        return self.array(layer, INDEX) if f"layers.{layer}.{INDEX}" in self._content[0] else None

    def copy_rows(
        self, table: TablePlace, rank: int, ranks: int, arrays: Arrays
    ) -> Iterator[Numbers]:
        """Copy the rows that a rank holds, where they are in the file, piece by piece.

        Of a file without an index rows of zeros are left out, so that pages of a table that were
        never touched stay untouched.

        Args:
            table: in the rank's group of today.
            rank: in the group.
            ranks: of the group.
            arrays: of the rank's store; with zeros, or, if the file has an index, older values.

        Yields:
            Local numbers of the rows that were copied.
        """
        rows = common_rows(self._entry.rows_of(table.layer), table.held(rank, ranks))
        if not rows:
            return
        here = {name: self.array(table.layer, name) for name in arrays}
        size = sum(as_records(array).dtype.itemsize for array in here.values())
        for source, numbers in self._pieces(table.layer, rows, max(1, CHUNK_BYTES // size)):
            local = (table.first_row + numbers) // ranks
            if isinstance(source, slice):
                written = np.zeros(len(local), dtype=np.bool_)
                for name, array in here.items():
                    step = rows.step // ranks
                    _copy_written(
                        _bytes(array)[source], _bytes(arrays[name]), local[0], step, written
                    )
                yield local[written]
            else:
                for name, array in here.items():
                    as_records(arrays[name])[local] = as_records(array)[source]
                yield local

    def _pieces(
        self, layer: int, rows: range, length: int
    ) -> Iterator[tuple[slice | Numbers, Numbers]]:
        """Places in the file and numbers of those rows that it has, a piece at a time."""
        index = self.index(layer)
        if index is None:
            for begin in range(0, len(rows), length):
                part = rows[begin : begin + length]
                numbers = np.arange(part.start, part.stop, part.step, dtype=np.int64)
                yield places(part, self._entry.rows_of(layer)), numbers
            return
        for begin in range(0, len(index), length):
            numbers = index[begin : begin + length]
            mine = np.flatnonzero((numbers - rows.start) % rows.step == 0)
            yield begin + mine, numbers[mine]


def as_records(array: NDArray[Any]) -> NDArray[Any]:
    """A view of an array with one element for each row, whatever the row is made of."""
    width = math.prod(array.shape[1:]) * array.itemsize
    return array.reshape(len(array), -1).view(np.dtype((np.void, width))).reshape(-1)


def _bytes(array: NDArray[Any]) -> UInt8[np.ndarray, "rows bytes"]:
    """A view of an array with the bytes of each row."""
    return array.reshape(len(array), -1).view(np.uint8)


@compiled
def _copy_written(
    source: UInt8[np.ndarray, "rows bytes"],
    target: UInt8[np.ndarray, "held bytes"],
    first: int,
    step: int,
    written: Bool[np.ndarray, "rows"],
) -> None:
    """Copy row i to `first + i step` unless all its bits are zero, and note that it was not."""
    for row in range(source.shape[0]):
        column = 0
        while column < source.shape[1] and source[row, column] == 0:
            column += 1
        if column < source.shape[1]:
            written[row] = True
            for column in range(source.shape[1]):
                target[first + row * step, column] = source[row, column]
