"""What the ranks that share Engram's tables tell each other: requests for rows, and sums of gradients.

Only the thread of `parallel.engram_service` calls this. Everything lies in host memory and travels
by uneven all-to-alls on a group of its own (gloo), which no other thread may use.
"""

import datetime
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int32, Int64, Shaped
from numpy.typing import NDArray

from parallel.engram_plan import StepPlan, distinct
from parallel.engram_tree import SumOrder, order_partial_sums, order_sums


class Job(IntEnum):
    """What the ranks do together; they say so to each other before each exchange."""

    ANNOUNCE = 1
    ROWS = 2
    REDUCE = 3
    UPDATE = 4
    SKIP = 5
    LOOKUP = 6
    LATE = 7


class SideGroup:
    """The ranks that share the tables; a rank alone needs no group and makes no copies."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float) -> None:
        self.group = group
        self.rank, self.ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        self.timeout = datetime.timedelta(seconds=timeout_seconds)

    def meet(
        self, job: Job, step: int, counts: Int64[np.ndarray, "ranks kinds"]
    ) -> Int64[np.ndarray, "ranks kinds"]:
        """Tell each rank what is done now and how many of each kind of item it will get.

        Communication: an all-to-all of a few numbers, of one size whatever is done: ranks that are
        at different jobs find out here, where uneven exchanges would hang.

        Args:
            job: at hand.
            step: that it belongs to.
            counts: for each rank, of (up to two) kinds of items.

        Returns:
            How many items of each kind come from each rank.

        Raises:
            RuntimeError: a rank is at something else; on all ranks alike.
        """
        said = np.zeros((self.ranks, 4), np.int64)
        said[:, :2] = job, step
        said[:, 2 : 2 + counts.shape[1]] = counts
        one = np.ones(self.ranks, np.int64)
        heard = self.exchange(said, one, one)
        other = np.flatnonzero((heard[:, :2] != said[:, :2]).any(axis=1))
        if len(other):
            theirs = Job(heard[other[0], 0]).name.lower()
            raise RuntimeError(
                f"rank {self.rank} of the group is at {job.name.lower()} of step {step}, rank"
                f" {other[0]} at {theirs} of step {heard[other[0], 1]}"
            )
        return heard[:, 2 : 2 + counts.shape[1]]

    def exchange(
        self,
        items: Shaped[np.ndarray, "sent *rest"],
        send: Int64[np.ndarray, "ranks"],
        receive: Int64[np.ndarray, "ranks"],
    ) -> Shaped[np.ndarray, "received *rest"]:
        """Send consecutive items to the ranks, zero or more to each; received are sorted by source.

        Communication: one all-to-all of `items`.

        Raises:
            RuntimeError: a rank has gone, or did not come within the timeout.
        """
        if self.group is None or self.ranks == 1:
            return items
        received = np.empty((int(receive.sum()), *items.shape[1:]), items.dtype)
        work = dist.all_to_all_single(
            torch.from_numpy(received),
            torch.from_numpy(np.ascontiguousarray(items)),
            receive.tolist(),
            send.tolist(),
            group=self.group,
            async_op=True,
        )
        assert work is not None
        work.wait(self.timeout)
        return received

    def sum(self, numbers: Int64[np.ndarray, "numbers"]) -> Int64[np.ndarray, "numbers"]:
        """Sum over the ranks, exact. Communication: one all-reduce of `numbers`.

        Raises:
            RuntimeError: a rank has gone, or did not come within the timeout.
        """
        total = numbers.copy()
        if self.group is not None and self.ranks > 1:
            work = dist.all_reduce(torch.from_numpy(total), group=self.group, async_op=True)
            assert work is not None
            work.wait(self.timeout)
        return total


@dataclass(frozen=True)
class Requests:
    """Rows that the ranks ask of each other for one step, seen from one of them."""

    asked: Int64[np.ndarray, "asked"]
    """The rows that this rank asks for, each by its number at its owner; by owner."""
    send: Int64[np.ndarray, "ranks"]
    """How many of those each owner has."""
    local: Int64[np.ndarray, "requested"]
    """The rows that are asked of this rank; by who asks."""
    receive: Int64[np.ndarray, "ranks"]
    """How many of those each rank asks for."""
    owned: Int64[np.ndarray, "owned"]
    """The distinct ones of `local`, ascending."""
    index: Int32[np.ndarray, "requested"]
    """Of `local` in `owned`."""


@dataclass(frozen=True)
class GradientRoute:
    """How the gradients of one step reach the owners of the rows."""

    partial: SumOrder
    """Of this rank's occurrences, to the sums that it sends."""
    send: Int64[np.ndarray, "ranks"]
    """How many of these each owner gets."""
    receive: Int64[np.ndarray, "ranks"]
    """How many come from each rank."""
    total: SumOrder
    """Of the received ones, to the gradients of `Requests.owned`."""


def request_rows(side: SideGroup, job: Job, step: int, plan: StepPlan) -> Requests:
    """Tell the owners which of their rows this rank needs, for reading only.

    Communication: `SideGroup.meet`, then the ids.
    """
    receive = side.meet(job, step, plan.splits[:, None])[:, 0]
    return _request(side, plan, receive)


def announce_step(side: SideGroup, step: int, plan: StepPlan) -> tuple[Requests, GradientRoute]:
    """Tell the owners which of their rows this rank needs, and in which sums gradients will come.

    Communication: `SideGroup.meet`, then the ids, then row and place of each partial sum.
    """
    partial, row = order_partial_sums(plan.inverse, plan.places, plan.limits, len(plan.rows))
    ends = np.cumsum(plan.splits)
    send = np.diff(np.searchsorted(row, ends), prepend=0)
    receive = side.meet(Job.ANNOUNCE, step, np.stack([plan.splits, send], axis=1))
    requests = _request(side, plan, receive[:, 0])
    # An owner counts rows as they were asked for by each rank.
    in_request = row - np.repeat(ends - plan.splits, send)
    came = side.exchange(np.stack([in_request, partial.first_places], axis=1), send, receive[:, 1])
    before = np.cumsum(receive[:, 0]) - receive[:, 0]
    slots = requests.index[came[:, 0] + np.repeat(before, receive[:, 1])]
    total = order_sums(slots, came[:, 1], len(requests.owned))
    return requests, GradientRoute(partial, send, receive[:, 1], total)


def _request(side: SideGroup, plan: StepPlan, receive: NDArray[np.int64]) -> Requests:
    asked = plan.rows // side.ranks
    local = side.exchange(asked, plan.splits, receive)
    owned, index = distinct(local)
    order = np.argsort(owned)  # ascending: results then do not depend on who asked first
    moved = np.empty(len(order), np.int32)
    moved[order] = np.arange(len(order), dtype=np.int32)
    return Requests(asked, plan.splits, local, receive, owned[order], moved[index])
