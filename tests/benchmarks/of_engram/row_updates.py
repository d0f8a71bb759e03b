"""What the update of a rank's rows costs, for `mneme bench engram`.

CPU time of one thread: the least of several rounds, since neighbours on the machine only add to it.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from launch.bench import Row
from parallel.config import EngramRowDtype
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum
from parallel.engram_rows import RowStore

ROUNDS, SETS = 31, 6
OPTIMIZERS: dict[str, RowOptimizer] = {
    "lazy Adam": LazyAdam(0.9, 0.999, 1e-8),
    "row-wise Adagrad": RowAdagrad(1e-8),
    "Sinkhorn momentum": SinkhornMomentum(0.95, 0.2),
}
TARGETS = {"lazy Adam": 1 / 4, "row-wise Adagrad": 1 / 20}
"""Promised part of the time of SparseAdam."""
Local = NDArray[np.int64]


def update_rows(rows: int = 2_000_000, width: int = 64, touched: int = 50_000) -> list[Row]:
    """Updates of touched rows, beside torch.optim.SparseAdam on the same, each with its own table."""
    sets, gradients = _touched(rows, touched), _gradients(touched, width)
    given, made = sparse_adam(rows, sets, gradients)
    answer = []
    for name, optimizer in OPTIMIZERS.items():
        seconds, _ = store_seconds(optimizer, rows, sets, gradients)
        ratio, target = seconds / given, TARGETS.get(name)
        answer.append(
            Row(
                case=f"{name}, 50,000 of 2M x 64 | SparseAdam, gradient given"
                + ("; target of the ratio" if target else ""),
                value=1e3 * seconds,
                unit="CPU ms",
                peer=1e3 * given,
                ratio=ratio,
                target=target,
                met=None if target is None else ratio <= target,
            )
        )
        answer.append(
            Row(
                case=f"{name} | SparseAdam and making its sparse gradient",
                value=1e3 * seconds,
                unit="CPU ms",
                peer=1e3 * made,
                ratio=seconds / made,
            )
        )
    return answer


def store_seconds(
    optimizer: RowOptimizer,
    rows: int,
    sets: list[Local],
    gradients: NDArray[np.float32],
    *,
    dtype: EngramRowDtype = "fp32",
    huge_pages: bool = True,
) -> tuple[float, float]:
    """Seconds of an update and of a gather of the rows of one set."""
    store = RowStore(
        rows,
        gradients.shape[1],
        optimizer,
        rank=0,
        ranks=1,
        dtype=dtype,
        storage="memory",
        seed=0,
        huge_pages=huge_pages,
    )
    for array in store.arrays.values():
        array[:] = 0
    out = np.empty_like(gradients)

    def update(turn: int) -> None:
        store.update(sets[turn % SETS], gradients, step=turn, learning_rate=1e-3, scale=0.5)

    def gather(turn: int) -> None:
        store.gather(sets[turn % SETS], out)

    seconds = least_seconds(update), least_seconds(gather)
    store.close()
    return seconds


def sparse_adam(
    rows: int, sets: list[Local], gradients: NDArray[np.float32]
) -> tuple[float, float]:
    """Seconds of torch's step on a gradient that is there, and together with making it."""
    weight = torch.nn.Parameter(torch.zeros(rows, gradients.shape[1]))
    optimizer = torch.optim.SparseAdam([weight], lr=1e-3)
    values = torch.from_numpy(gradients)

    def sparse(turn: int) -> torch.Tensor:
        index = torch.from_numpy(sets[turn % SETS])[None]
        made = torch.sparse_coo_tensor(index, values, weight.shape, check_invariants=False)
        return made.coalesce()

    given = [sparse(turn) for turn in range(SETS)]

    def step(turn: int) -> None:
        weight.grad = given[turn % SETS]
        optimizer.step()  # type: ignore[no-untyped-call]

    def make_and_step(turn: int) -> None:
        weight.grad = sparse(turn)
        optimizer.step()  # type: ignore[no-untyped-call]

    return least_seconds(step), least_seconds(make_and_step)


def least_seconds(run: Callable[[int], None]) -> float:
    """CPU time of a call, the least of some rounds after some that do not count."""
    for turn in range(SETS):
        run(turn)
    times = []
    for turn in range(ROUNDS):
        start = time.process_time()
        run(turn)
        times.append(time.process_time() - start)
    return min(times)


def _touched(rows: int, count: int) -> list[Local]:
    random = np.random.default_rng(0)
    return [np.sort(random.choice(rows, count, replace=False)) for _ in range(SETS)]


def _gradients(count: int, width: int) -> NDArray[np.float32]:
    random = np.random.default_rng(1)
    return (random.standard_normal((count, width)) * 1e-3).astype(np.float32)
