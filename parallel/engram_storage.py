"""Memory for the arrays of an Engram table, which may be larger than what is ever used of it.

All kinds begin as zeros that take no memory: a page becomes resident when something in it is touched.

    memory   private memory of the process, with huge pages if wanted. The fastest.
    shared   memory that other processes of the node can map, too: `HostArray.share` gives what
             `open_shared` needs. They read this rank's rows where they lie, without a copy through a
             socket. The memory has no name in a file system, so nothing of it remains when its owner
             is gone, however that ends, and the size of /dev/shm does not matter. The kernel gives it
             no huge pages by default.
    mmap     a sparse file, for tables larger than memory. Pages come from the drive at the first touch
             (`prefault` asks for them ahead) and go back when memory is short.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import finalize

import numpy as np
from jaxtyping import Int
from numba import types
from numpy.typing import DTypeLike, NDArray

from parallel.compiled import compiled

HostStorage = Literal["memory", "shared", "mmap"]
"""`parallel.config.EngramStorage` without device."""

_PAGE = mmap.PAGESIZE
_WILL_NEED = os.POSIX_FADV_WILLNEED
_fadvise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)


@dataclass(frozen=True)
class SharedArray:
    """Where another process of the node finds an array; can be sent to it."""

    process: int
    descriptor: int
    inode: int
    """Tells the memory from another that a later process of the same number has there."""
    shape: tuple[int, ...]
    dtype: str


class HostArray:
    """One array and the memory that it lies in, which lives as long as a view of the array."""

    def __init__(
        self,
        mapping: mmap.mmap,
        shape: Sequence[int],
        dtype: DTypeLike,
        descriptor: int | None = None,
    ) -> None:
        self.array: NDArray[Any] = _as_array(mapping, shape, dtype)
        self._mapping, self._descriptor = mapping, descriptor
        self._close_descriptor = finalize(self, _close, descriptor)

    def share(self) -> SharedArray:
        """What `open_shared` needs; of `shared` only."""
        assert self._descriptor is not None, "private memory cannot be shared"
        array = self.array
        inode = os.fstat(self._descriptor).st_ino
        return SharedArray(os.getpid(), self._descriptor, inode, array.shape, array.dtype.str)

    def prefault(self, rows: Int[np.ndarray, "touched"]) -> None:
        """Ask the drive for the pages of rows, without waiting; one call of the system per page."""
        assert self._descriptor is not None, "only files have pages elsewhere"
        _ask_for_rows(self._descriptor, rows, self.array.strides[0])

    def resident_bytes(self) -> int:
        """Memory that this process has mapped of the array; takes the system some milliseconds."""
        start = self.array.ctypes.data
        return _resident_bytes(start, start + self.array.nbytes)

    def close(self) -> None:
        """Write what is to be kept, and let go of the memory."""
        if self._descriptor is not None:
            self._mapping.flush()
        self._close_descriptor()
        del self.array, self._mapping


def private_array(shape: Sequence[int], dtype: DTypeLike, *, huge_pages: bool) -> HostArray:
    """Allocate private memory.

    A forked child does not get it: it would double, page by page, while this process goes on to write.

    Args:
        shape: of the array.
        dtype: of the array.
        huge_pages: ask for pages of 2 MB: rows that lie far apart are found faster, but the first
            touch of one makes 2 MB resident.

    Raises:
        ValueError: the system has not that much.
    """
    size = _size(shape, dtype)
    try:
        # One page more, without the advice: the kernel joins neighbours that are alike, and
        # resident_bytes is by area.
        mapping = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(
            f"parallel.engram.storage=memory: {size} bytes for {tuple(shape)} {np.dtype(dtype)}: "
            f"{error.strerror}; more ranks, or storage=mmap, need less memory per rank"
        ) from error
    huge = mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE
    for advice in (huge, mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP):
        mapping.madvise(advice, 0, size)
    return HostArray(mapping, shape, dtype)


def shared_array(shape: Sequence[int], dtype: DTypeLike) -> HostArray:
    """Allocate memory that other processes of the node can map."""
    descriptor = os.memfd_create("engram")
    size = _size(shape, dtype)
    os.truncate(descriptor, size)
    return HostArray(mmap.mmap(descriptor, size), shape, dtype, descriptor)


def open_shared(shared: SharedArray) -> NDArray[Any]:
    """Map an array that another process of the node shares, to be read.

    The owner goes on to write in it: when it may be read is up to the two.

    Raises:
        ValueError: there is no such memory; the owner is gone or is not seen from here.
    """
    path = Path(f"/proc/{shared.process}/fd/{shared.descriptor}")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; the owner of a shared table must be alive, on this node, in "
            f"the same container and of the same user"
        ) from error
    try:
        if os.fstat(descriptor).st_ino != shared.inode:
            raise ValueError(f"{path}: not the shared table; its owner is gone")
        size = _size(shared.shape, shared.dtype)
        mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return _as_array(mapping, shared.shape, shared.dtype)


def file_array(path: Path, shape: Sequence[int], dtype: DTypeLike) -> HostArray:
    """Map a sparse file, made or emptied here: it is scratch, and starts as zeros like memory.

    Raises:
        ValueError: the directory does not exist, the drive is too small, the file has another size
            (it may not be ours to empty), or another process uses it.
    """
    size = _size(shape, dtype)
    if not path.parent.is_dir():
        raise ValueError(f"parallel.engram.path={path.parent}: no such directory; make it first")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _check_file(descriptor, path, size)
        os.truncate(descriptor, 0)
        os.truncate(descriptor, size)
        mapping = mmap.mmap(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    # Without this, the drive reads 17 times as much around each row.
    mapping.madvise(mmap.MADV_RANDOM)
    return HostArray(mapping, shape, dtype, descriptor)


def _check_file(descriptor: int, path: Path, size: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"parallel.engram.path={path.parent}: {path.name} is in use by another process; give "
            f"each run a directory"
        ) from error
    state = os.fstat(descriptor)
    if state.st_size not in (0, size):
        raise ValueError(
            f"parallel.engram.path={path.parent}: {path.name} has {state.st_size} bytes, not the "
            f"{size} of this table; remove it, or give another directory"
        )
    drive = os.fstatvfs(descriptor)
    free = drive.f_bavail * drive.f_frsize + state.st_blocks * 512
    if free < size:
        raise ValueError(
            f"parallel.engram.path={path.parent}: {path.name} may grow to {size} bytes and {free} are "
            f"free; a write beyond them would kill the process"
        )


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _size(shape: Sequence[int], dtype: DTypeLike) -> int:
    """Bytes; at least one, as nothing cannot be mapped."""
    return max(1, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)


def _as_array(mapping: mmap.mmap, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(mapping, dtype, count).reshape(shape)


@compiled
def _ask_for_rows(descriptor: int, rows: Int[np.ndarray, "touched"], row_bytes: int) -> None:
    asked = -1
    for place in range(rows.shape[0]):
        first, last = rows[place] * row_bytes // _PAGE, ((rows[place] + 1) * row_bytes - 1) // _PAGE
        # Rows in ascending order often begin in the page in which the one before ends.
        first += first == asked
        if first <= last:
            _fadvise(descriptor, first * _PAGE, (last - first + 1) * _PAGE, _WILL_NEED)
        asked = last


def _resident_bytes(start: int, end: int) -> int:
    """Sum of `Rss` over the areas of /proc/self/smaps that begin within [start, end)."""
    total, inside = 0, False
    with Path("/proc/self/smaps").open() as areas:
        for line in areas:
            name, *values = line.split()
            if not name.endswith(":"):
                inside = start <= int(name.partition("-")[0], 16) < end
            elif inside and name == "Rss:":
                total += int(values[0]) * 1024
    return total
