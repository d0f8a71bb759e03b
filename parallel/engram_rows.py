"""The rows of an Engram table that one rank owns, with their optimizer's states; no communication."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import DTypeLike, NDArray

from parallel.config import EngramRowDtype
from parallel.engram_formats import Master, gather_rows, rounding_of, stored_type
from parallel.engram_optimizers import RowOptimizer, SumOver, Update
from parallel.engram_storage import (
    HostArray,
    HostStorage,
    SharedArray,
    file_array,
    open_shared,
    private_array,
    shared_array,
)


@runtime_checkable
class Marks(Protocol):
    """Is told which rows change, such as what an incremental checkpoint has to save."""

    def mark(self, local: Int[np.ndarray, "touched"]) -> None:
        """These rows have changed."""
        ...


class RowReader:
    """Rows as numbers of the master's type, wherever and however they are stored."""

    def __init__(
        self, rows: NDArray[Any], scale: Float[np.ndarray, "rows"] | None, master: Master
    ) -> None:
        self._rows, self._scale, self._master = rows, scale, master

    def gather(
        self, local: Int[np.ndarray, "touched"], out: Float[np.ndarray, "touched width"]
    ) -> None:
        """Write rows, in the order of `local`, into `out`, which has the master's type.

        Raises:
            IndexError: a row is not one of this owner's.
        """
        assert out.dtype == self._master, f"{out.dtype}: the table's precision is {self._master}"
        _check(local, len(self._rows))
        gather_rows(self._rows, self._scale, local, out)


@dataclass(frozen=True)
class SharedRows:
    """Where the other processes of a node find an owner's rows; can be sent to them."""

    rows: SharedArray
    scale: SharedArray | None
    master: Master

    def open(self) -> RowReader:
        """Map the rows, to be read. When that is safe is up to owner and reader: there is no lock.

        Raises:
            ValueError: the owner is gone, or is not seen from this process.
        """
        scale = None if self.scale is None else open_shared(self.scale)
        return RowReader(open_shared(self.rows), scale, self.master)


class RowStore:
    """Rows `rank`, `rank + ranks`, `rank + 2 ranks`, ... of a table, all zeros at first.

    Nothing is written when it is made: a page of memory or of a file is taken when a row in it is first
    updated, with huge pages 2 MB at a time.

    One thread at a time may call it; the loops do not hold the interpreter's lock.

    Args:
        num_rows: of the whole table.
        width: numbers in a row.
        optimizer: updates rows.
        rank: this owner.
        ranks: all owners.
        dtype: of stored rows. bf16 and fp8 are rounded at random and have no master copy; the
            optimizer's states have the master's type.
        storage: see `parallel.engram_storage`.
        seed: of random rounding.
        path: directory of the files of `mmap`, one for each array, named `<array>-<rank>-of-<ranks>`;
            for this table only. They are scratch: emptied at the start, and left behind.
        huge_pages: for `memory`.
        master: precision of gradients, updates and states, and of what `gather` returns.

    Raises:
        ValueError: the memory or the files cannot be had; see `parallel.engram_storage`.
    """

    arrays: dict[str, NDArray[Any]]
    """`rows` [rows width], the optimizer's states, and `scale` [rows] for fp8. Live: what a checkpoint
    saves and loads in place. bf16 and fp8 as codes, uint16 and uint8."""
    trackers: list[Marks]
    """Are told which rows every update changes."""
    sum_over: SumOver | None
    """Sum over all owners, which `SinkhornMomentum` needs if there are several. The service sets it."""

    def __init__(
        self,
        num_rows: int,
        width: int,
        optimizer: RowOptimizer,
        *,
        rank: int,
        ranks: int,
        dtype: EngramRowDtype,
        storage: HostStorage,
        seed: int,
        path: Path | None = None,
        huge_pages: bool = True,
        master: Master = np.float32,
    ) -> None:
        self.num_rows, self.width, self.master = num_rows, width, master
        self.num_local = len(range(rank, num_rows, ranks))
        self.trackers, self.sum_over = [], None
        self._optimizer, self._storage = optimizer, storage
        self._rank, self._ranks, self._seed = rank, ranks, seed
        self._path, self._huge_pages = path, huge_pages
        kept: dict[str, tuple[tuple[int, ...], Any]] = {
            "rows": ((width,), stored_type(dtype, master)),
            **({"scale": ((), np.float32)} if dtype == "fp8" else {}),
            **optimizer.states(width, master),
        }
        self._memory = {
            name: self._allocate(name, (self.num_local, *shape), kind)
            for name, (shape, kind) in kept.items()
        }
        self.arrays = {name: memory.array for name, memory in self._memory.items()}
        self._reader = RowReader(self.arrays["rows"], self.arrays.get("scale"), master)

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> HostArray:
        if self._storage == "memory":
            return private_array(shape, dtype, huge_pages=self._huge_pages)
        if self._storage == "shared":
            return shared_array(shape, dtype)
        assert self._path is not None, "parallel.engram.path: mmap needs a directory"
        return file_array(self._path / f"{name}-{self._rank}-of-{self._ranks}", shape, dtype)

    @property
    def bytes_per_row(self) -> int:
        """Of the row and all its states."""
        return sum(int(np.prod(array.shape[1:])) * array.itemsize for array in self.arrays.values())

    def gather(
        self, local: Int[np.ndarray, "touched"], out: Float[np.ndarray, "touched width"]
    ) -> None:
        """See `RowReader.gather`."""
        self._reader.gather(local, out)

    def update(
        self,
        local: Int[np.ndarray, "touched"],
        gradients: Float[np.ndarray, "touched width"],
        *,
        step: int,
        learning_rate: float,
        scale: float,
    ) -> None:
        """Let the optimizer change rows, and tell the trackers.

        With `SinkhornMomentum` all owners call this in every step, also those with no row to change.

        Args:
            local: rows by their place at this owner, each once; ascending is fastest.
            gradients: of each, summed over all tokens, in the master's type.
            step: number of the update; random rounding depends on it.
            learning_rate: of this step.
            scale: gradients are multiplied by it.

        Raises:
            IndexError: a row is not one of this owner's.
        """
        assert gradients.dtype == self.master, f"{gradients.dtype}: precision is {self.master}"
        _check(local, self.num_local)
        rounding = rounding_of(seed=self._seed, step=step, rank=self._rank, ranks=self._ranks)
        update = Update(local, gradients, learning_rate, scale, rounding)
        self._optimizer.update(self.arrays, update, self.sum_over)
        for tracker in self.trackers:
            tracker.mark(local)

    def prefault(self, local: Int[np.ndarray, "touched"]) -> None:
        """Ask the drive for rows and their states, without waiting; nothing to do for memory.

        Raises:
            IndexError: a row is not one of this owner's.
        """
        _check(local, self.num_local)
        if self._storage == "mmap":
            for memory in self._memory.values():
                memory.prefault(local)

    def resident_bytes(self) -> int:
        """Memory that this process has mapped of all arrays; takes the system some milliseconds."""
        return sum(memory.resident_bytes() for memory in self._memory.values())

    @property
    def shared(self) -> SharedRows | None:
        """What other processes of the node need to read the rows where they lie; None: they cannot."""
        if self._storage != "shared":
            return None
        scale = self._memory["scale"].share() if "scale" in self._memory else None
        return SharedRows(self._memory["rows"].share(), scale, self.master)

    @property
    def rows_are_independent(self) -> bool:
        """Whether one step may update its rows in several calls; see `RowOptimizer`."""
        return self._optimizer.rows_are_independent

    def close(self) -> None:
        """Write files and let go of the memory, once nobody else holds one of the arrays."""
        del self._reader
        self.arrays = {}
        while self._memory:
            self._memory.popitem()[1].close()


def _check(local: Int[np.ndarray, "touched"], num_local: int) -> None:
    if len(local) and not 0 <= local.min() <= local.max() < num_local:
        bad = local[(local < 0) | (local >= num_local)][0]
        raise IndexError(f"row {bad} of an owner of {num_local} rows of an Engram table")
