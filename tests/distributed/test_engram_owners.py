"""Rows of every format and optimizer: the same bits for any number of owners, prefetched or not."""

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.config import EngramRowDtype
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum
from parallel.engram_rows import RowStore
from parallel.engram_thread import EngramServiceError
from tests.engram_steps import (
    ROWS,
    WIDTH,
    RankCourse,
    Spread,
    lanes,
    run_rank,
    scattered,
    step_plan,
    zigzag,
)
from tests.harness import run_distributed

OPTIMIZERS: dict[str, RowOptimizer] = {
    "adam": LazyAdam(0.9, 0.99, 1e-8),
    "adagrad": RowAdagrad(1e-8),
    "sinkhorn": SinkhornMomentum(0.9, 0.2),
}
Case = tuple[str, EngramRowDtype]
SOME: Sequence[Case] = (("adagrad", "fp8"), ("adam", "fp32"), ("sinkhorn", "bf16"))
DTYPES: Sequence[EngramRowDtype] = ("fp32", "bf16", "fp8")
ALL: Sequence[Case] = list(product(OPTIMIZERS, DTYPES))
STEPS = 9
SPREADS: dict[int, Spread] = {1: lanes, 2: zigzag, 3: scattered, 4: lanes, 8: scattered}


class SlowStore(RowStore):
    """Whose updates take random times, before and after they write."""

    pause = 0.0

    def update(self, *args: Any, **options: Any) -> None:
        time.sleep(random.choice([0.0, self.pause]))
        super().update(*args, **options)
        time.sleep(random.choice([0.0, self.pause]))


def course(
    group: dist.ProcessGroup | None,
    prefetch: Any,
    spread: Spread,
    optimizer: str,
    dtype: EngramRowDtype,
    **options: Any,
) -> tuple[RankCourse, dict[str, NDArray[Any]]]:
    """What the rank reads, and the rows and states that it owns in the end."""
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    options = {"storage": "memory", "seed": 3, "huge_pages": False, "dtype": dtype, **options}
    made = OPTIMIZERS[optimizer]
    store = SlowStore(ROWS, WIDTH, made, rank=rank, ranks=ranks, **options)
    store.pause = 0.003 if options["storage"] == "shared" else 0.0
    done = run_rank(store, group, prefetch, spread, STEPS)
    return done, {name: array.copy() for name, array in store.arrays.items()}


def owners_rank(rank: int, sizes: tuple[int, ...], expected: dict[Any, Any]) -> list[Any]:
    wrong = list[Any]()
    for ranks in sizes:
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        for case, whole in expected.items():
            _, mine = course(group, "exact", SPREADS[ranks], *case)
            wrong += [
                (ranks, *case, name)
                for name, array in whole.items()
                if not np.array_equal(mine[name], array[rank::ranks])
            ]
    return wrong


@pytest.mark.parametrize(
    ("sizes", "cases"),
    [((2,), SOME), pytest.param((2, 3, 4, 8), ALL, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_rows_and_states_are_the_same_for_any_number_of_owners(
    sizes: tuple[int, ...], cases: Sequence[Case]
) -> None:
    expected = {case: course(None, "off", lanes, *case)[1] for case in cases}
    assert all(array.any() for arrays in expected.values() for array in arrays.values())
    assert run_distributed(owners_rank, sizes[-1], sizes, expected) == [[]] * sizes[-1]


def shared_rank(rank: int, nodes: int, expected: dict[Any, Any]) -> list[Any]:
    """Four ranks; the first ones are on a node each, the others together on the last node."""
    random.seed(rank)
    group, wrong = dist.new_group(list(range(4))), list[Any]()
    plans = [step_plan(step, rank, 4, scattered)[0] for step in range(STEPS)]
    far = [owner for owner in range(4) if min(owner, nodes - 1) != min(rank, nodes - 1)]
    rows = sum(int(plan.splits[far].sum()) for plan in plans)
    with patch("parallel.engram_fetch._node", lambda: (str(min(rank, nodes - 1)), "")):
        for case, whole in expected.items():
            for prefetch in ("exact", "off"):
                done, mine = course(group, prefetch, scattered, *case, storage="shared")
                wrong += [
                    (prefetch, *case, name)
                    for name, array in whole.items()
                    if not np.array_equal(mine[name], array[rank::4])
                ]
                if done.stats.fetch_bytes != rows * WIDTH * 4:
                    wrong.append((prefetch, *case, done.stats.fetch_bytes))
    return wrong


@pytest.mark.parametrize(
    ("nodes", "number"),
    [
        (1, 1),
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(2, 3, marks=pytest.mark.slow),
    ],
)
def test_shared_rows_are_read_where_they_lie(nodes: int, number: int) -> None:
    """With slow updates: a read that comes too early or too late would see other rows."""
    expected = {case: course(None, "off", lanes, *case)[1] for case in SOME[:number]}
    assert run_distributed(shared_rank, 4, nodes, expected) == [[]] * 4


def blind_rank(rank: int) -> str:
    """The first rank cannot map what the second one shares."""
    group = dist.new_group([0, 1])
    blind = patch("parallel.engram_rows.SharedRows.open", side_effect=ValueError("it is gone"))
    with blind if rank == 0 else nullcontext(), pytest.raises(EngramServiceError) as caught:
        course(group, "exact", lanes, "adam", "fp32", storage="shared")
    return str(caught.value)


def test_memory_that_cannot_be_mapped_is_refused_on_all_ranks() -> None:
    for rank, text in enumerate(run_distributed(blind_rank, 2)):
        assert f"of rank {rank} failed in start" in text
        assert "rank 0 of the group cannot map rows of rank 1: it is gone" in text
