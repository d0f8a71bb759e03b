"""Training steps of Engram's tables, on one rank in plain numpy and through the table service."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.config import EngramPrefetch
from parallel.engram_plan import StepPlan, plan_step, subtree_limits, token_places
from parallel.engram_service import ServiceStats, TableService
from parallel.engram_worker import Rows
from tests.engram_store import PlainStore, tree_sum_at

SEQUENCES, LENGTH, COLUMNS, WIDTH, ROWS = 4, 6, 3, 4, 144
TOKENS = SEQUENCES * LENGTH
PLACES = token_places(np.arange(TOKENS) // LENGTH, np.arange(TOKENS) % LENGTH, LENGTH)
UPDATE = {"learning_rate": 0.05, "scale": 0.5}
NOTHING_APPLIED = 4
"""Every so many steps, one is skipped."""


def step_ids(step: int) -> NDArray[np.int64]:
    """Rows of all tokens of the global batch; sometimes all of one owner among 1, 2, 3, 4 or 8."""
    random = np.random.default_rng([1, step])
    few = np.minimum(random.zipf(1.4, (TOKENS, COLUMNS)), ROWS // COLUMNS) - 1
    ids = few * COLUMNS + np.arange(COLUMNS)
    return few % 2 * 72 + 24 * np.arange(COLUMNS) if step % 5 == 3 else ids


def step_gradients(step: int, values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of all tokens, over 4 decades; those of a token depend on the rows that it read."""
    random = np.random.default_rng([2, step])
    size = 10 ** random.uniform(-4, 0, (TOKENS, COLUMNS, 1))
    noise = (random.standard_normal((TOKENS, COLUMNS, WIDTH)) * size).astype(values.dtype)
    noise += noise * values
    return noise


def is_skipped(step: int) -> bool:
    return step % NOTHING_APPLIED == NOTHING_APPLIED - 1


Master = Literal["float32", "float64"]


@dataclass(frozen=True)
class Course:
    """What a run reads in each step, and the table that it leaves."""

    read: list[NDArray[np.floating]]
    squares: list[float]
    table: NDArray[np.floating]


@cache
def plain_course(steps: int, master: Master = "float32") -> Course:
    """On one rank, without any of the code under test; sums by the recursive tree."""
    store, read, squares = PlainStore(ROWS, WIDTH, master=np.dtype(master).type), [], []
    levels = int(PLACES.max()).bit_length()
    for step in range(steps):
        ids = step_ids(step)
        read.append(store.table[ids])
        gradients = step_gradients(step, read[-1])
        rows, sums = np.unique(ids), []
        for row in rows:
            at = np.argwhere(ids == row)
            leaves = {int(PLACES[t]): gradients[t, c] for t, c in at}
            sums.append(tree_sum_at(leaves, 0, levels))
        values = np.array(sums)
        squares.append(float((values.astype(np.float64) ** 2).sum()))
        if not is_skipped(step):
            store.update(rows, values, step=step, **UPDATE)
    return Course(read, squares, store.table)


Spread = Callable[[int, int], NDArray[np.int64]]
"""Rank of each token of a step, for a number of ranks."""


def scattered(step: int, ranks: int) -> NDArray[np.int64]:
    """Any rank; in some steps all tokens are on the last one, in some the first has none."""
    owners = np.random.default_rng([3, step]).integers(0, ranks, TOKENS)
    return np.where(step % 4 == 1, ranks - 1, np.maximum(owners, min(ranks - 1, step % 3 // 2)))


def lanes(step: int, ranks: int) -> NDArray[np.int64]:
    """Consecutive tokens."""
    return np.arange(TOKENS) * ranks // TOKENS


def zigzag(step: int, ranks: int) -> NDArray[np.int64]:
    """The i-th and i-th last of parts of each sequence, as far as there are parts."""
    position = np.minimum(np.arange(LENGTH), np.arange(LENGTH)[::-1])
    return np.tile(np.minimum(position, ranks - 1), SEQUENCES)


def step_plan(
    step: int, rank: int, ranks: int, spread: Spread
) -> tuple[StepPlan, NDArray[np.int64]]:
    """Plan of a rank, and which tokens of the batch it has, in the order of microbatches."""
    mine = np.random.default_rng([4, step]).permutation(TOKENS)
    mine = mine[spread(step, ranks)[mine] == rank]
    limits = subtree_limits(PLACES[mine], num_sequences=SEQUENCES, sequence_length=LENGTH)
    ids = step_ids(step)[mine]
    return plan_step(ids, PLACES[mine], limits, num_rows=ROWS, ranks=ranks), mine


@dataclass(frozen=True)
class RankCourse:
    """What a rank read, squares of the gradients of its rows, and costs."""

    read: list[NDArray[np.floating]]
    squares: list[float]
    stats: ServiceStats


def run_rank(
    store: Rows,
    group: dist.ProcessGroup | None,
    prefetch: EngramPrefetch,
    spread: Spread,
    steps: int,
    *,
    pause: float = 0.0,
) -> RankCourse:
    """Train `store` through a service; `pause`: longest of random sleeps in both threads, in seconds."""
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    service = TableService(store, group, prefetch=prefetch, timeout_seconds=20.0)
    idle = random.Random(rank)

    def wait(_: Rows | None = None) -> None:
        time.sleep(idle.choice([0.0, 0.0, pause]))

    read, squares = [], []
    plans = [step_plan(step, rank, ranks, spread) for step in range(steps)]
    service.announce(0, plans[0][0])
    for step, (plan, mine) in enumerate(plans):
        rows = service.rows(step)
        read.append(rows[plan.inverse])
        if step + 1 < steps:
            service.submit(wait)
            service.announce(step + 1, plans[step + 1][0])
        wait()
        values = np.zeros((TOKENS, COLUMNS, WIDTH), rows.dtype)
        values[mine] = read[-1]
        squares.append(service.reduce(step, step_gradients(step, values)[mine]))
        service.submit(wait)
        if is_skipped(step):
            service.skip(step)
        else:
            service.update(step, **UPDATE)
        wait()
    stats = service.take_stats()
    service.close()
    return RankCourse(read, squares, stats)


def same_reads(course: RankCourse, expected: Course, rank: int, ranks: int, spread: Spread) -> bool:
    """Whether a rank read, bit for bit, what its tokens read in the plain course."""
    plans = [step_plan(step, rank, ranks, spread) for step in range(len(course.read))]
    return all(
        np.array_equal(read, plain[mine])
        for read, plain, (_, mine) in zip(course.read, expected.read, plans, strict=True)
    )
