import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.config import EngramRowDtype
from parallel.engram_formats import Master
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum
from parallel.engram_rows import RowStore


def new_store(
    num_rows: int = 100,
    optimizer: RowOptimizer | None = None,
    *,
    width: int = 8,
    rank: int = 0,
    ranks: int = 1,
    dtype: EngramRowDtype = "fp32",
    master: Master = np.float32,
) -> RowStore:
    return RowStore(
        num_rows,
        width,
        optimizer or RowAdagrad(1e-8),
        rank=rank,
        ranks=ranks,
        dtype=dtype,
        storage="memory",
        seed=0,
        huge_pages=False,
        master=master,
    )


def update(store: RowStore, local: list[int], step: int = 0) -> None:
    gradients = np.ones((len(local), store.width), store.master)
    store.update(np.array(local, np.int64), gradients, step=step, learning_rate=1.0, scale=1.0)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "row_bytes"),
    [
        (LazyAdam(0.9, 0.99, 1e-8), "fp32", 3 * 32 + 4),
        (LazyAdam(0.9, 0.99, 1e-8), "bf16", 16 + 2 * 32 + 4),
        (RowAdagrad(1e-8), "fp8", 8 + 4 + 4),
        (SinkhornMomentum(0.9, 0.2), "bf16", 16 + 32),
    ],
)
def test_arrays_of_a_rank(optimizer: RowOptimizer, dtype: EngramRowDtype, row_bytes: int) -> None:
    store = new_store(10, optimizer, rank=2, ranks=4, dtype=dtype)
    assert {len(array) for array in store.arrays.values()} == {2}
    assert store.bytes_per_row == row_bytes
    assert sum(array.nbytes for array in store.arrays.values()) == 2 * row_bytes
    assert not any(array.any() for array in store.arrays.values())


def test_a_rank_may_own_nothing() -> None:
    store = new_store(3, rank=5, ranks=8)
    update(store, [])
    store.gather(np.empty(0, np.int64), np.empty((0, 8), np.float32))
    assert store.num_local == store.resident_bytes() == 0
    store.close()


def test_rows_come_in_the_order_that_is_asked_for() -> None:
    store = new_store(100)
    store.arrays["rows"][:] = np.arange(100)[:, None]
    local = np.random.default_rng(0).permutation(100)
    out = np.empty((100, 8), np.float32)
    store.gather(local, out)
    assert np.array_equal(out[:, 3], local)


@pytest.mark.parametrize(("local", "bad"), [([3, 50], 50), ([-1, 4], -1), ([0, 10**12], 10**12)])
def test_rows_of_others_are_refused_by_name(local: list[int], bad: int) -> None:
    store = new_store(100, ranks=2)
    with pytest.raises(IndexError, match=f"row {bad} of an owner of 50 rows"):
        update(store, local)
    with pytest.raises(IndexError, match=f"row {bad} of an owner of 50 rows"):
        store.gather(np.array(local), np.empty((2, 8), np.float32))
    with pytest.raises(IndexError, match=f"row {bad} of an owner of 50 rows"):
        store.prefault(np.array(local))
    assert not store.arrays["rows"].any()


def test_trackers_hear_of_every_update() -> None:
    class Heard:
        def __init__(self) -> None:
            self.rows: list[list[int]] = []

        def mark(self, local: NDArray[np.int64]) -> None:
            self.rows.append(local.tolist())

    store, heard = new_store(), [Heard(), Heard()]
    store.trackers += heard
    update(store, [1, 4])
    update(store, [2])
    assert [one.rows for one in heard] == [[[1, 4], [2]]] * 2


def test_precisions_are_not_mixed() -> None:
    store = new_store(master=np.float64)
    with pytest.raises(AssertionError, match="float32"):
        store.gather(np.arange(2), np.empty((2, 8), np.float32))
    gradients = np.ones((2, 8), np.float32)
    with pytest.raises(AssertionError, match="float32"):
        store.update(np.arange(2), gradients, step=0, learning_rate=1.0, scale=1.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_an_update_is_that_of_fp32_rounded_to_a_neighbour(dtype: EngramRowDtype) -> None:
    """What a row is before comes from its codes, and its states are not rounded."""
    optimizer = LazyAdam(0.9, 0.99, 1e-8)
    rounded, exact = new_store(200, optimizer, dtype=dtype), new_store(200, optimizer)
    random, everything = np.random.default_rng(0), np.arange(200)
    out = np.empty((200, 8), np.float32)
    for step in range(20):
        gradients = random.standard_normal((200, 8)).astype(np.float32)
        for store in (rounded, exact):
            store.update(everything, gradients, step=step, learning_rate=0.1, scale=1.0)
        assert np.array_equal(rounded.arrays["exp_avg"], exact.arrays["exp_avg"])
        rounded.gather(everything, out)
        wanted = exact.arrays["rows"]
        steps_of = {"bf16": 2.0**-7, "fp8": 2.0**-3}[dtype]
        least = 0 if dtype == "bf16" else 2.0**-9 * rounded.arrays["scale"][:, None]
        assert (np.abs(out - wanted) <= np.maximum(np.abs(wanted) * steps_of, least)).all()
        assert (out != wanted).any()
        wanted[:] = out


def test_updates_do_not_hold_the_lock_of_the_interpreter() -> None:
    store = new_store(400_000, width=64)
    local, gradients = np.arange(400_000), np.ones((400_000, 64), np.float32)
    store.update(local, gradients, step=0, learning_rate=1.0, scale=1.0)
    spans: list[tuple[float, float]] = []

    def work() -> None:
        for _ in range(3):
            start = time.perf_counter()
            store.update(local, gradients, step=0, learning_rate=1.0, scale=1.0)
            spans.append((start, time.perf_counter()))

    thread, ticks = threading.Thread(target=work), []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    assert sum(start < tick < end for start, end in spans for tick in ticks) > 20


def test_closing_lets_go_of_the_memory() -> None:
    store = new_store(10_000)
    update(store, [1])
    address = f"{store.arrays['rows'].ctypes.data:x}-"
    assert address in Path("/proc/self/maps").read_text()
    store.close()
    assert address not in Path("/proc/self/maps").read_text()
    assert store.arrays == {}


def test_a_step_may_update_its_rows_in_parts_if_they_are_independent() -> None:
    assert not new_store(optimizer=SinkhornMomentum(0.9, 0.2)).rows_are_independent
    stores = [new_store(optimizer=LazyAdam(0.9, 0.99, 1e-8), dtype="bf16") for _ in range(2)]
    assert stores[0].rows_are_independent
    gradients = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    for step in range(3):
        for store, parts in zip(stores, (1, 7), strict=True):
            for part in range(parts):
                local = np.arange(part, 100, parts)
                store.update(
                    local, gradients[part::parts].copy(), step=step, learning_rate=1.0, scale=1.0
                )
    for name, array in stores[0].arrays.items():
        assert np.array_equal(array, stores[1].arrays[name])


def test_only_shared_memory_is_shared() -> None:
    assert new_store().shared is None
