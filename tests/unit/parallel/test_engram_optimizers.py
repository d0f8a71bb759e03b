import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.config import EngramRowDtype
from parallel.engram_formats import Master
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum
from parallel.engram_rows import RowStore
from tests import plain_row_optimizers
from train.optim import sinkhorn_momentum

ADAM = LazyAdam(0.9, 0.99, 1e-8)
SINKHORN = SinkhornMomentum(0.9, 0.2)
OPTIMIZERS: list[RowOptimizer] = [ADAM, RowAdagrad(1e-8), SINKHORN]
WIDTH = 20
Step = tuple[NDArray[np.int64], NDArray[Any]]


def new_store(
    optimizer: RowOptimizer,
    rows: int,
    width: int = WIDTH,
    *,
    master: Master = np.float32,
    dtype: EngramRowDtype = "fp32",
    rank: int = 0,
    ranks: int = 1,
) -> RowStore:
    return RowStore(
        rows,
        width,
        optimizer,
        rank=rank,
        ranks=ranks,
        dtype=dtype,
        storage="memory",
        seed=5,
        huge_pages=False,
        master=master,
    )


def steps(rows: int, count: int, width: int = WIDTH, master: Master = np.float32) -> Iterator[Step]:
    """Random rows, none in the third step, with gradients of very different sizes."""
    random = np.random.default_rng(0)
    for step in range(count):
        touched = 0 if step == 2 else random.integers(1, rows)
        local = np.sort(random.choice(rows, touched, replace=False))
        gradients = random.standard_normal((touched, width)) * 10.0 ** random.uniform(
            -4, 1, (touched, 1)
        )
        yield local, gradients.astype(master)


def tensors(store: RowStore) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in store.arrays.items()}


def apply(store: RowStore, step: int, local: NDArray[np.int64], gradients: NDArray[Any]) -> None:
    store.update(local, gradients, step=step, learning_rate=0.01, scale=0.3)


@pytest.mark.parametrize("master", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
def test_same_bits_as_plain_torch(optimizer: RowOptimizer, master: Master) -> None:
    store = new_store(optimizer, 70, master=master)
    plain = tensors(store)
    for step, (local, gradients) in enumerate(steps(70, 30, master=master)):
        apply(store, step, local, gradients)
        plain_row_optimizers.update(
            optimizer,
            plain,
            torch.from_numpy(local),
            torch.from_numpy(gradients),
            learning_rate=0.01,
            scale=0.3,
        )
        for name, tensor in plain.items():
            assert np.array_equal(store.arrays[name], tensor.numpy()), (step, name)
    assert store.arrays["rows"].any()


@pytest.mark.parametrize(("master", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_adam_with_all_rows_is_the_dense_one(master: Master, tolerance: float) -> None:
    store = new_store(ADAM, 40, master=master)
    weight = nn.Parameter(tensors(store)["rows"])
    dense = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    random = np.random.default_rng(1)
    for step in range(60):
        gradients = random.standard_normal((40, WIDTH)).astype(master)
        apply(store, step, np.arange(40), gradients)
        weight.grad = torch.from_numpy(gradients) * 0.3
        dense.step()
    error = np.abs(store.arrays["rows"] - weight.detach().numpy()).max()
    assert error <= tolerance * float(weight.detach().abs().max())


def test_adam_is_torchs_sparse_one_but_for_the_count_of_updates() -> None:
    """SparseAdam corrects by the number of all steps, and has eps before the correction."""
    optimizer = LazyAdam(0.9, 0.99, 1e-30)
    store = new_store(optimizer, 30, master=np.float64)
    weight = nn.Parameter(tensors(store)["rows"])
    sparse = torch.optim.SparseAdam([weight], lr=0.01, betas=(0.9, 0.99), eps=1e-30)
    random = np.random.default_rng(2)

    def both(step: int, local: NDArray[np.int64]) -> None:
        gradients = random.standard_normal((len(local), WIDTH))
        apply(store, step, local, gradients)
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(local)[None],
            torch.from_numpy(gradients) * 0.3,
            weight.shape,
            check_invariants=True,
        ).coalesce()
        sparse.step()  # type: ignore[no-untyped-call]

    # These rows have had as many updates as there were steps.
    always = np.array([1, 4, 5, 22])
    for step in range(10):
        both(step, always)
    np.testing.assert_allclose(store.arrays["rows"], weight.detach().numpy(), rtol=1e-13)
    assert not np.delete(store.arrays["rows"], always, axis=0).any()
    for step in range(10, 20):
        both(step, np.sort(random.choice(30, 9, replace=False)))
    state = sparse.state[weight]
    for name in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(store.arrays[name], state[name].numpy(), rtol=1e-13, atol=1e-18)
    assert store.arrays["num_updates"].sum() == 10 * 4 + 10 * 9


def test_adam_corrects_by_the_updates_of_the_row() -> None:
    """The first update of a row moves it by the learning rate, however late it comes."""
    store = new_store(ADAM, 10)
    for step in range(50):
        apply(store, step, np.array([3]), np.ones((1, WIDTH), np.float32))
    apply(store, 50, np.array([7]), np.full((1, WIDTH), 4.0, np.float32))
    np.testing.assert_allclose(store.arrays["rows"][7], -0.01, rtol=1e-6)
    assert store.arrays["num_updates"].tolist() == [0, 0, 0, 50, 0, 0, 0, 1, 0, 0]


def test_adam_goes_on_when_the_corrections_are_one() -> None:
    store = new_store(LazyAdam(0.5, 0.5, 1e-8), 1)
    store.arrays["num_updates"][0] = 2**30
    apply(store, 0, np.array([0]), np.ones((1, WIDTH), np.float32))
    # m = 0.3 / 2 and v = 0.09 / 2, not corrected.
    np.testing.assert_allclose(store.arrays["rows"][0], -0.01 * 0.15 / 0.045**0.5, rtol=1e-6)


def test_adagrad_is_torchs_if_the_columns_are_alike_in_size() -> None:
    """Then the mean square of a row is that of each of its columns."""
    store = new_store(RowAdagrad(1e-8), 40, master=np.float64)
    weight = nn.Parameter(tensors(store)["rows"])
    dense = torch.optim.Adagrad([weight], lr=0.01, eps=1e-8)
    random = np.random.default_rng(3)
    for step in range(30):
        local = np.sort(random.choice(40, 15, replace=False))
        signs = random.choice([-1.0, 1.0], (15, WIDTH))
        gradients = signs * random.uniform(0.1, 3.0, (15, 1))
        apply(store, step, local, gradients)
        # A gradient of 0 changes nothing in Adagrad.
        weight.grad = torch.zeros_like(weight)
        weight.grad[torch.from_numpy(local)] = torch.from_numpy(gradients) * 0.3
        dense.step()
    np.testing.assert_allclose(store.arrays["rows"], weight.detach().numpy(), rtol=1e-13)


@pytest.mark.parametrize(
    ("master", "tolerance"),
    # The sums over columns are of integers: units of 2^-56 at 40 rows, some columns have 10^-4 of a row.
    [(np.float32, 1e-6), (np.float64, 1e-13)],
)
def test_sinkhorn_with_all_rows_is_the_dense_one(master: Master, tolerance: float) -> None:
    store = new_store(SINKHORN, 40, master=master)
    weight = nn.Parameter(tensors(store)["rows"])
    groups: list[dict[str, object]] = [{"params": [weight], "learning_rate_multiplier": 1.0}]
    dense = sinkhorn_momentum.SinkhornMomentum(groups, lr=0.01, momentum=0.9, update_rms=0.2)
    random = np.random.default_rng(4)
    sizes = np.outer(10.0 ** random.uniform(-2, 2, 40), 10.0 ** random.uniform(-2, 2, WIDTH))
    # One row is below the threshold, one is 0.
    sizes[5], sizes[6] = 1e-9, 0.0
    for step in range(20):
        gradients = (random.standard_normal((40, WIDTH)) * sizes).astype(master)
        apply(store, step, np.arange(40), gradients)
        weight.grad = torch.from_numpy(gradients) * 0.3
        dense.step()
    error = np.abs(store.arrays["rows"] - weight.detach().numpy()).max()
    assert error <= tolerance * float(weight.detach().abs().max())
    assert not store.arrays["rows"][5:7].any()


def test_sinkhorn_keeps_rows_that_are_not_touched() -> None:
    store = new_store(SINKHORN, 10)
    random = np.random.default_rng(0)
    apply(store, 0, np.arange(10), random.standard_normal((10, WIDTH)).astype(np.float32))
    before = {name: array.copy() for name, array in store.arrays.items()}
    apply(store, 1, np.arange(4), random.standard_normal((4, WIDTH)).astype(np.float32))
    for name, array in store.arrays.items():
        assert np.array_equal(array[4:], before[name][4:])
        assert (array[:4] != before[name][:4]).any(axis=1).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_sinkhorn_does_not_depend_on_the_size_of_gradients(scale: float) -> None:
    gradients = np.random.default_rng(0).standard_normal((9, WIDTH))
    stores = [new_store(SINKHORN, 9) for _ in range(2)]
    apply(stores[0], 0, np.arange(9), gradients.astype(np.float32))
    apply(stores[1], 0, np.arange(9), (gradients * scale).astype(np.float32))
    np.testing.assert_allclose(stores[0].arrays["rows"], stores[1].arrays["rows"], rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_same_bits_for_any_number_of_owners(optimizer: RowOptimizer, dtype: EngramRowDtype) -> None:
    whole = table_of(optimizer, dtype, 1)
    for ranks in (2, 3, 4, 8):
        spread = table_of(optimizer, dtype, ranks)
        for name, array in whole.items():
            assert np.array_equal(array, spread[name]), (ranks, name)


def table_of(optimizer: RowOptimizer, dtype: EngramRowDtype, ranks: int) -> dict[str, NDArray[Any]]:
    """All arrays after some steps, put together from the owners, each of which is a thread."""
    stores = [new_store(optimizer, 50, dtype=dtype, rank=r, ranks=ranks) for r in range(ranks)]
    summed, lock = sum_of_threads(ranks), threading.Lock()
    failed: list[BaseException] = []

    def train(rank: int) -> None:
        try:
            for step, (rows, gradients) in enumerate(steps(50, 8)):
                mine = rows % ranks == rank
                apply(stores[rank], step, rows[mine] // ranks, gradients[mine])
        except BaseException as error:
            with lock:
                failed.append(error)

    for rank, store in enumerate(stores):
        store.sum_over = summed(rank)
    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    whole = {}
    for name, array in stores[0].arrays.items():
        whole[name] = np.empty((50, *array.shape[1:]), array.dtype)
        for rank, store in enumerate(stores):
            whole[name][rank::ranks] = store.arrays[name]
    return whole


def sum_of_threads(ranks: int) -> Callable[[int], Callable[[NDArray[Any]], NDArray[Any]]]:
    barrier, given = threading.Barrier(ranks, timeout=30), [np.zeros(0, np.int64)] * ranks

    def of(rank: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
        def sum_over(numbers: NDArray[Any]) -> NDArray[Any]:
            given[rank] = numbers
            barrier.wait()
            total: NDArray[Any] = np.sum(given, axis=0)
            barrier.wait()
            return total

        return sum_over

    return of


def test_sinkhorn_refuses_several_owners_without_a_sum() -> None:
    store = new_store(SINKHORN, 10, ranks=2)
    with pytest.raises(AssertionError, match="no sum over them"):
        apply(store, 0, np.arange(2), np.ones((2, WIDTH), np.float32))
