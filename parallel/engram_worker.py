"""What the thread of `parallel.engram_service` does with the rows of a rank; called there alone.

Each method is one job, the same one on all ranks that share the tables, and starts by making sure of that.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from parallel.config import EngramPrefetch
from parallel.engram_exchange import (
    GradientRoute,
    Job,
    Requests,
    SideGroup,
    announce_step,
    request_rows,
)
from parallel.engram_fetch import (
    Reader,
    Source,
    Split,
    all_rows,
    far_ranks,
    fetch,
    map_neighbours,
    split_late,
)
from parallel.engram_plan import StepPlan
from parallel.engram_tree import sum_of_squares, tree_sum

SumOver = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@runtime_checkable
class Rows(Source, Protocol):
    """The rows of one rank and their optimizer; `parallel.engram_rows.RowStore`."""

    sum_over: SumOver | None
    """Is set to a sum over all ranks, for updates that need one; None: there is one rank."""

    @property
    def num_rows(self) -> int:
        """Of all tables, on all ranks."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's update depends on that row alone: then an update may come in two parts."""

    def update(
        self,
        local: NDArray[np.int64],
        gradients: NDArray[np.floating],
        *,
        step: int,
        learning_rate: float,
        scale: float,
    ) -> None:
        """Apply summed gradients, times `scale`, to distinct local rows."""

    def prefault(self, local: NDArray[np.int64], /) -> None:
        """Ask for the memory of rows ahead of their use."""


@dataclass
class Announced:
    """An announced step. The thread writes the last three before `arrived` is done."""

    step: int
    plan: StepPlan
    arrived: "Future[NDArray[np.floating]]"
    asked: bool = False
    reduced: bool = False
    fetches: list[tuple[float, float]] = field(default_factory=list)
    late_rows: int = 0
    far_rows: int = 0


@dataclass
class _Running:
    """What the thread knows of an announced step."""

    of: Announced
    requests: Requests
    route: GradientRoute
    rows: NDArray[np.floating]
    awaited: NDArray[np.bool_]
    """Which of `requests.owned` the next step reads, too."""
    late: Split | None = None
    """Rows that come after the update of the step before."""
    sums: NDArray[np.floating] | None = None
    """Gradients of `requests.owned`."""


class TableWorker:
    """Reads and updates rows, with the other ranks."""

    def __init__(self, store: Rows, side: SideGroup, prefetch: EngramPrefetch) -> None:
        """Of the thread from now on, `store` and `side` too."""
        self._store, self._side, self._prefetch = store, side, prefetch
        store.sum_over = side.sum if side.ranks > 1 else None
        self._running: deque[_Running] = deque()
        self._readers: dict[int, Reader] = {}

    def start(self) -> None:
        """Find the ranks whose rows can be read where they lie; comes first."""
        self._readers = map_neighbours(self._side, self._store)

    def announce(self, current: Announced) -> None:
        """Exchange what the ranks need and send what can travel now."""
        requests, route = announce_step(self._side, current.step, current.plan)
        current.far_rows = int(requests.send[far_ranks(self._side, self._readers)].sum())
        awaited = np.zeros(len(requests.owned), np.bool_)
        running = _Running(current, requests, route, self._room(requests), awaited)
        self._store.prefault(requests.owned)
        before = self._running[-1] if self._running else None
        self._running.append(running)
        if self._prefetch == "exact" and before is not None:
            self._fetch_early(running, before)
        elif self._prefetch != "off":
            self._fetch(running, all_rows(requests))
            current.arrived.set_result(running.rows)

    def rows(self, current: Announced) -> None:
        """Send all rows of a step; where nothing travels ahead."""
        self._meet(Job.ROWS, current.step)
        running = self._running[0]
        self._fetch(running, all_rows(running.requests))
        current.arrived.set_result(running.rows)

    def reduce(self, current: Announced, gradients: NDArray[np.floating]) -> tuple[float, int]:
        """Sum of squares of the gradients of this rank's rows; how many sums went to other ranks."""
        self._meet(Job.REDUCE, current.step)
        running, route = self._running[0], self._running[0].route
        partial = tree_sum(gradients, route.partial)
        received = self._side.exchange(partial, route.send, route.receive)
        running.sums = tree_sum(received, route.total)
        return sum_of_squares(running.sums), len(partial) - int(route.send[self._side.rank])

    def update(self, current: Announced, learning_rate: float, scale: float) -> None:
        """Rows that the next step waits for come first, and leave before the others are updated."""
        self._meet(Job.UPDATE, current.step)
        running = self._running.popleft()
        owned, sums = running.requests.owned, running.sums
        assert sums is not None

        def update(chosen: NDArray[np.bool_]) -> None:
            self._store.update(
                owned[chosen],
                sums[chosen],
                step=current.step,
                learning_rate=learning_rate,
                scale=scale,
            )

        if self._store.rows_are_independent:
            update(running.awaited)
            self._fetch_late()
            update(~running.awaited)
        else:
            update(np.ones(len(owned), np.bool_))
            self._fetch_late()

    def skip(self, current: Announced) -> None:
        """End a step as it is; the next one need not wait for it any more."""
        self._meet(Job.SKIP, current.step)
        self._running.popleft()
        self._fetch_late()

    def lookup(self, plan: StepPlan) -> NDArray[np.floating]:
        """Rows as they are."""
        requests = request_rows(self._side, Job.LOOKUP, 0, plan)
        rows = self._room(requests)
        fetch(self._side, self._readers, requests, all_rows(requests), rows)
        self._meet_readers(Job.LOOKUP, 0)  # a job of the owner may write next
        return rows

    def _meet(self, job: Job, step: int) -> None:
        self._side.meet(job, step, np.zeros((self._side.ranks, 0), np.int64))

    def _meet_readers(self, job: Job, step: int) -> None:
        if self._store.shared is not None:
            self._meet(job, step)

    def _room(self, requests: Requests) -> NDArray[np.floating]:
        return np.empty((len(requests.asked), self._store.width), self._store.master)

    def _fetch(self, running: _Running, split: Split) -> None:
        start = time.perf_counter()
        fetch(self._side, self._readers, running.requests, split, running.rows)
        running.of.fetches.append((start, time.perf_counter()))

    def _fetch_early(self, running: _Running, before: _Running) -> None:
        """What the step before does not touch."""
        owned = running.requests.owned
        _, touched, again = np.intersect1d(
            before.requests.owned, owned, assume_unique=True, return_indices=True
        )
        before.awaited[touched] = True
        late = np.zeros(len(owned), np.bool_)
        late[again] = True
        early, running.late = split_late(self._side, running.requests, late)
        running.of.late_rows = len(running.late.asked)
        self._fetch(running, early)

    def _fetch_late(self) -> None:
        """What the next step had to wait for, if it is announced."""
        if not self._running or self._running[0].late is None:
            return
        running, late = self._running[0], self._running[0].late
        self._meet_readers(Job.LATE, running.of.step)
        self._fetch(running, late)
        running.of.arrived.set_result(running.rows)
