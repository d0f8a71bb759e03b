"""Memory and files of a table: what is resident, what is left behind, what is refused."""

import ctypes
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.engram_optimizers import LazyAdam, RowAdagrad
from parallel.engram_rows import RowStore, SharedRows
from parallel.engram_storage import HostStorage, file_array

MIB = 2**20


def new_store(storage: HostStorage, path: Path | None = None, **changed: Any) -> RowStore:
    """2^22 rows of 64 bytes with 4 of Adagrad: 272 MiB, of which nearly nothing is used."""
    given: dict[str, Any] = {"num_rows": 2**22, "width": 16, "optimizer": RowAdagrad(1e-8)}
    given |= {"rank": 0, "ranks": 1, "dtype": "fp32", "seed": 0, "huge_pages": False}
    return RowStore(storage=storage, path=path, **given | changed)


def resident() -> int:
    """Of this process, by the system's own count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def touch(store: RowStore, local: NDArray[np.int64]) -> None:
    gradients = np.ones((len(local), store.width), np.float32)
    store.update(local, gradients, step=0, learning_rate=1.0, scale=1.0)


def values(store: RowStore, local: NDArray[np.int64]) -> NDArray[Any]:
    out = np.empty((len(local), store.width), np.float32)
    store.gather(local, out)
    return out


@pytest.mark.parametrize("storage", ["memory", "shared", "mmap"])
def test_only_touched_pages_are_resident(storage: HostStorage, tmp_path: Path) -> None:
    small = new_store("memory", num_rows=10)
    touch(small, np.arange(10))  # compiles
    values(small, np.arange(10))
    before = resident()
    store = new_store(storage, tmp_path)
    assert store.bytes_per_row == 68
    local = np.arange(0, 2**22, 2**12)
    store.prefault(local)
    assert store.resident_bytes() == 0
    touch(store, local)
    # A page of each row, and one in 16 of a page of the state.
    assert 1024 * mmap.PAGESIZE <= store.resident_bytes() <= 2.1 * 1024 * mmap.PAGESIZE
    assert resident() - before < 12 * MIB
    assert (values(store, local) == -1.0).all()
    assert not values(store, local + 1).any()
    store.close()
    assert resident() - before < 4 * MIB


def test_resident_when_all_is_used_is_rows_by_bytes() -> None:
    store = new_store(
        "memory", num_rows=100_000, ranks=4, rank=3, optimizer=LazyAdam(0.9, 0.99, 1e-8)
    )
    touch(store, np.arange(25_000))
    assert store.bytes_per_row == 3 * 64 + 4
    assert store.resident_bytes() == pytest.approx(25_000 * 196, rel=0.01)


def test_each_table_counts_its_own_memory() -> None:
    """Although the kernel would join areas that are alike and lie side by side."""
    stores = [new_store("memory", num_rows=2000) for _ in range(8)]
    for store in stores[::2]:
        touch(store, np.arange(2000))
    for store in stores[::2]:
        assert store.resident_bytes() == pytest.approx(2000 * 68, abs=2 * mmap.PAGESIZE)
    assert [store.resident_bytes() for store in stores[1::2]] == [0] * 4


def test_a_forked_child_gets_no_private_rows() -> None:
    """They would be copied page by page while the parent trains on."""
    store = new_store("memory", num_rows=1000)
    touch(store, np.arange(1000))
    address = f"{store.arrays['rows'].ctypes.data:x}-"

    def mapped(end: Connection) -> None:
        end.send(address in Path("/proc/self/maps").read_text())

    assert address in Path("/proc/self/maps").read_text()
    assert not ask_child(mapped)


def ask_child(function: Callable[[Connection], None]) -> Any:
    """What a forked child sends."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=function, args=(there,))
    child.start()
    assert here.poll(30), "no answer"
    answer = here.recv()
    child.join()
    return answer


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_another_process_reads_shared_rows_in_place(dtype: str) -> None:
    store = new_store("shared", num_rows=1000, dtype=dtype)
    touch(store, np.arange(0, 1000, 7))
    handle = store.shared
    assert handle is not None
    local = np.arange(10)

    def read(end: Connection) -> None:
        reader, out = handle.open(), np.empty((10, 16), np.float32)
        reader.gather(local, out)
        end.send(out.copy())
        end.recv()
        reader.gather(local, out)
        end.send(out)

    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=read, args=(there,))
    child.start()
    assert here.poll(30)
    assert np.array_equal(here.recv(), values(store, local))
    # The owner writes on; the reader sees that without a message.
    touch(store, local)
    here.send("again")
    assert here.poll(30)
    assert np.array_equal(here.recv(), values(store, local))
    child.join()
    assert (values(store, np.array([0, 7])) < -1).all()


def test_nothing_is_left_of_shared_rows_when_the_owner_is_killed() -> None:
    def own(end: Connection) -> None:
        store = new_store("shared", num_rows=1000)
        touch(store, np.arange(1000))
        end.send(store.shared)
        signal.pause()

    names = set(Path("/dev/shm").iterdir())
    here, there = multiprocessing.Pipe()
    owner = multiprocessing.get_context("fork").Process(target=own, args=(there,))
    owner.start()
    assert here.poll(30)
    handle: SharedRows = here.recv()
    out = np.empty((1, 16), np.float32)
    handle.open().gather(np.array([5]), out)
    assert (out == -1).all()
    owner.kill()
    owner.join()
    assert set(Path("/dev/shm").iterdir()) <= names
    with pytest.raises(ValueError, match=f"/proc/{owner.pid}/fd/.*the owner of a shared table"):
        handle.open()


def test_shared_rows_refuse_what_has_their_place_now(tmp_path: Path) -> None:
    store = new_store("shared", num_rows=1000)
    handle = store.shared
    assert handle is not None
    with (tmp_path / "other").open("wb") as other:
        store.close()
        os.dup2(other.fileno(), handle.rows.descriptor)
    with pytest.raises(ValueError, match="not the shared table"):
        handle.open()
    os.close(handle.rows.descriptor)


def test_files_are_written_when_closed_and_empty_when_made_again(tmp_path: Path) -> None:
    store = new_store("mmap", tmp_path, num_rows=1000, ranks=2, rank=1)
    touch(store, np.arange(3))
    store.close()
    names = {"rows-1-of-2": 500 * 64, "sum_of_squares-1-of-2": 500 * 4}
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == names
    rows = np.fromfile(tmp_path / "rows-1-of-2", np.float32).reshape(500, 16)
    assert (rows[:3] == -1).all()
    assert not rows[3:].any()
    again = new_store("mmap", tmp_path, num_rows=1000, ranks=2, rank=1)
    assert not values(again, np.arange(500)).any()


def test_a_file_of_another_size_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "rows-0-of-1").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"rows-0-of-1 has 9 bytes, not the 64000 of this table"):
        new_store("mmap", tmp_path, num_rows=1000)
    assert (tmp_path / "rows-0-of-1").read_bytes() == b"something"
    # Nothing stays locked by the attempt.
    (tmp_path / "rows-0-of-1").unlink()
    (tmp_path / "sum_of_squares-0-of-1").write_bytes(b"1")
    with pytest.raises(ValueError, match="sum_of_squares-0-of-1 has 1 bytes, not the 4000"):
        new_store("mmap", tmp_path, num_rows=1000)
    (tmp_path / "sum_of_squares-0-of-1").unlink()
    new_store("mmap", tmp_path, num_rows=1000)


def test_files_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.engram.path=.*/none: no such directory"):
        new_store("mmap", tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"rows-0-of-1 may grow to 1125899906842624 bytes and \d+ are"
    ):
        new_store("mmap", tmp_path, num_rows=2**44)
    first = new_store("mmap", tmp_path, num_rows=1000)
    with pytest.raises(ValueError, match="rows-0-of-1 is in use by another process"):
        new_store("mmap", tmp_path, num_rows=1000)
    first.close()
    new_store("mmap", tmp_path, num_rows=1000)


def test_memory_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match=r"storage=memory: \d+ bytes for \(70368744177664, 16\)"):
        new_store("memory", num_rows=2**46)


def test_prefault_reads_the_pages_of_rows_and_no_others(tmp_path: Path) -> None:
    path, page = tmp_path / "rows", mmap.PAGESIZE
    # Rows of three quarters of a page: many begin in one page and end in the next.
    rows = file_array(path, (400, page * 3 // 16), np.float32)
    rows.array[:] = 1.0
    drop(rows._mapping, path)
    if cached(path):
        pytest.skip(f"{tmp_path}: a file system in memory")
    rows.prefault(np.array([0, 1, 101, 399]))
    wanted = [0, 1, 75, 76, 299]
    deadline = time.monotonic() + 20
    while cached(path) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached(path) == wanted


def drop(mapping: mmap.mmap, path: Path) -> None:
    """Take a file out of memory."""
    mapping.flush()
    mapping.madvise(mmap.MADV_DONTNEED)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> list[int]:
    """Pages of a file that are in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(view)), pages) == 0
        del start
    return [page for page, state in enumerate(pages) if state & 1]
