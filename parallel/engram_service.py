"""The table service of a rank: one thread that owns rows, optimizer states and the group they travel on.

`train.memory` calls it. Calls put jobs in a queue, and the thread does them one after the other, so
that a caller never blocks inside a collective and nothing is read half written. All ranks that share
the tables make the same calls in the same order.

A step: `announce` its plan, as early as it is known; `rows`; forward and backward passes; `reduce`;
`update` or `skip`. The next step is announced while this one runs, and its rows begin to travel. With
exact prefetch only those travel early that this step does not touch, on any rank (an owner knows all
requests of both steps); the others follow once, right after the update, which starts with them.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch.distributed as dist
from jaxtyping import Float

from parallel.config import EngramPrefetch
from parallel.engram_exchange import SideGroup
from parallel.engram_plan import StepPlan
from parallel.engram_thread import EngramServiceError, JobThread
from parallel.engram_worker import Announced, Rows, TableWorker

Store = TypeVar("Store", bound=Rows)
T = TypeVar("T")


@dataclass(kw_only=True)
class ServiceStats:
    """What tables cost the steps whose rows were waited for since the last look."""

    fetch_seconds: float = 0.0
    """Gathering and exchange of rows, in the thread, without the exchange of plans before it."""
    hidden_seconds: float = 0.0
    """The part of that in which the caller did not wait for these rows."""
    waited_seconds: float = 0.0
    """For how long the caller waited for rows, whatever the thread did."""
    fetch_bytes: int = 0
    """Rows that this rank got from others, without those that it read where they lie."""
    gradient_bytes: int = 0
    """Partial sums that this rank sent to others."""
    unique_rows: int = 0
    occurrences: int = 0
    """How often the unique rows occur in the tokens of the rank."""
    late_rows: int = 0
    """Unique rows that had to wait for the update before."""


class TableService(Generic[Store]):
    """Reads and trains the rows of Engram's tables; see the module. One thread calls it.

    Every method but `close` raises `EngramServiceError` once the service has failed.
    """

    def __init__(
        self,
        store: Store,
        group: dist.ProcessGroup | None,
        *,
        prefetch: EngramPrefetch,
        timeout_seconds: float,
    ) -> None:
        """Start the thread; in a process that will not fork again.

        Args:
            store: rows of this rank; nobody else may touch it from now on.
            group: gloo, of the ranks that share the tables, for this service alone. None: one rank.
            prefetch: which rows travel early.
            timeout_seconds: an exchange that waits longer for other ranks fails.
        """
        self._store, self._prefetch = store, prefetch
        self._side = SideGroup(group, timeout_seconds)
        self._worker = TableWorker(store, self._side, prefetch)
        self._row_bytes = store.width * np.dtype(store.master).itemsize
        self._announced: deque[Announced] = deque()
        self._stats = ServiceStats()
        rank = 0 if group is None else dist.get_rank()
        self._thread = JobThread(f"rank {rank}")
        self._thread.submit(self._worker.start, "start")

    @property
    def error(self) -> EngramServiceError | None:
        """Why the service has failed."""
        return self._thread.error

    def announce(self, step: int, plan: StepPlan) -> None:
        """Give the plan of the next step; its rows start to travel, as far as `prefetch` allows.

        Args:
            step: any number that no announced step has.
            plan: of this rank's tokens.

        Raises:
            RuntimeError: two announced steps have had neither `update` nor `skip`.
            ValueError: the plan is for other tables or another number of ranks.
        """
        self._thread.check()
        running = [announced.step for announced in self._announced]
        if len(running) == 2 or step in running:
            raise RuntimeError(
                f"Engram: step {step} is announced while steps {running} run; update or skip step"
                f" {running[0]} first"
            )
        self._check(plan)
        announced = Announced(step, plan, self._thread.promise())
        self._thread.submit(lambda: self._worker.announce(announced), f"announce of step {step}")
        self._announced.append(announced)

    def rows(self, step: int) -> Float[np.ndarray, "unique width"]:
        """The rows of a step's plan as the step before left them; waits until all are here.

        Raises:
            RuntimeError: not the oldest announced step.
        """
        current = self._oldest(step, "rows")
        start = time.perf_counter()
        if self._prefetch == "off" and not current.asked:
            self._thread.submit(lambda: self._worker.rows(current), f"rows of step {step}")
        rows = current.arrived.result()
        if not current.asked:
            self._count(current, start, time.perf_counter())
        current.asked = True
        return rows

    def reduce(self, step: int, gradients: Float[np.ndarray, "tokens columns width"]) -> float:
        """Send the gradients of all occurrences to the owners, which sum them; waits for that.

        Args:
            step: the oldest announced one.
            gradients: of the loss of the global batch, in the rows' dtype; tokens as in the plan.

        Returns:
            Sum of squares of the summed gradients of the rows that this rank owns.

        Raises:
            RuntimeError: not the oldest announced step.
            ValueError: shape or dtype do not fit the plan and the rows.
        """
        current = self._oldest(step, "reduce")
        shape, dtype = (*current.plan.inverse.shape, self._store.width), self._store.master
        if gradients.shape != shape or gradients.dtype != dtype:
            raise ValueError(
                f"Engram: gradients of step {step} are {gradients.dtype} {gradients.shape}; the"
                f" plan and the rows want {np.dtype(dtype)} {shape}"
            )
        flat = gradients.reshape(-1, self._store.width)
        work = self._thread.submit(
            lambda: self._worker.reduce(current, flat), f"reduce of step {step}"
        )
        current.reduced = True
        squares, sums_sent = work.result()
        self._stats.gradient_bytes += sums_sent * self._row_bytes
        return squares

    def update(self, step: int, *, learning_rate: float, scale: float) -> None:
        """Apply the gradients of `reduce`, times `scale`, and end the step; returns at once.

        Raises:
            RuntimeError: not the oldest announced step, or `reduce` did not come before.
        """
        current = self._oldest(step, "update")
        if not current.reduced:
            raise RuntimeError(
                f"Engram: update of step {step} needs its gradients: reduce them first"
            )
        self._thread.submit(
            lambda: self._worker.update(current, learning_rate, scale), f"update of step {step}"
        )
        self._announced.popleft()

    def skip(self, step: int) -> None:
        """End a step without an update; returns at once.

        Raises:
            RuntimeError: not the oldest announced step.
        """
        current = self._oldest(step, "skip")
        self._thread.submit(lambda: self._worker.skip(current), f"skip of step {step}")
        self._announced.popleft()

    def lookup(self, plan: StepPlan) -> Float[np.ndarray, "unique width"]:
        """Rows as the last update left them, for reading; announced steps do not notice.

        Raises:
            ValueError: the plan is for other tables or another number of ranks.
        """
        self._check(plan)
        return self._thread.submit(lambda: self._worker.lookup(plan), "lookup").result()

    def submit(self, job: "Callable[[Store], T]") -> "Future[T]":
        """Run a job on the store after all that was called before, and before all that comes.

        What the job raises goes to its future alone. A job may write rows only while no step is
        announced: rows that travelled early would be out of date.
        """
        return self._thread.submit(lambda: job(self._store), "job", fatal=False)

    def take_stats(self) -> ServiceStats:
        """Costs since the last call."""
        taken, self._stats = self._stats, ServiceStats()
        return taken

    def close(self) -> None:
        """End the thread when its jobs are done; at once if the service has failed."""
        self._thread.close(self._side.timeout.total_seconds())

    def _oldest(self, step: int, call: str) -> Announced:
        self._thread.check()
        announced = [a.step for a in self._announced]
        if not announced or announced[0] != step:
            raise RuntimeError(
                f"Engram: {call} of step {step}, but the steps {announced} are announced"
            )
        return self._announced[0]

    def _check(self, plan: StepPlan) -> None:
        last, ranks = int(plan.rows.max(initial=0)), len(plan.splits)
        if last >= self._store.num_rows or ranks != self._side.ranks:
            raise ValueError(
                f"Engram: a plan for {ranks} ranks reads up to row {last}; here {self._side.ranks}"
                f" ranks share {self._store.num_rows} rows"
            )

    def _count(self, current: Announced, start: float, end: float) -> None:
        """Add the costs of a step whose rows were waited for from `start` to `end`."""
        stats, plan = self._stats, current.plan
        fetched = sum(last - first for first, last in current.fetches)
        seen = sum(max(0.0, min(last, end) - max(first, start)) for first, last in current.fetches)
        stats.fetch_seconds += fetched
        stats.hidden_seconds += fetched - seen
        stats.waited_seconds += end - start
        stats.fetch_bytes += current.far_rows * self._row_bytes
        stats.unique_rows += len(plan.rows)
        stats.occurrences += plan.inverse.size
        stats.late_rows += current.late_rows
