"""Rows on their way from the owners to the ranks that read them; `parallel.engram_worker` calls this.

Rows of another rank are gathered by their owner and travel. Where tables lie in shared memory, a rank
reads those of its node where they lie. That needs no lock, since owners write in updates only, and all
jobs begin with a meeting of all ranks (`SideGroup.meet`):

- What the updates before wrote is there when a job reads: its owner had done them when it came.
- Nobody writes what a job still reads: an update begins when all ranks have done the jobs before it.
- In an update itself, rows of the next step are read when their owners have changed them and met once
  more; after that they change rows only that no rank reads in the next step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from numpy.typing import DTypeLike, NDArray

from parallel.engram_exchange import Requests, SideGroup


@runtime_checkable
class Reader(Protocol):
    """Rows of one owner."""

    def gather(self, local: NDArray[np.int64], out: NDArray[np.floating], /) -> None:
        """Write rows, by their number at the owner, to `out`."""


@runtime_checkable
class SharedRows(Protocol):
    """Where the rows of an owner lie in memory that others can map; can be pickled."""

    def open(self) -> Reader:
        """Map them.

        Raises:
            ValueError: they are not seen from this process.
        """


@runtime_checkable
class Source(Reader, Protocol):
    """This rank's own rows."""

    @property
    def width(self) -> int:
        """Numbers of a row."""

    @property
    def master(self) -> DTypeLike:
        """In which rows are read and gradients come: fp32 or fp64."""

    @property
    def shared(self) -> SharedRows | None:
        """For the other ranks of the node; None: this is memory of this process alone."""


@dataclass(frozen=True)
class Split:
    """Which rows of a step travel together: their positions, where they lie and where they go."""

    asked: Int64[np.ndarray, "asked"]
    """In `Requests.asked` of the rank that reads them."""
    send: Int64[np.ndarray, "ranks"]
    """How many of those each owner has."""
    given: Int64[np.ndarray, "given"]
    """In `Requests.local` of the owner."""
    receive: Int64[np.ndarray, "ranks"]
    """How many of those go to each rank."""


def all_rows(requests: Requests) -> Split:
    """Everything travels together."""
    asked, given = np.arange(len(requests.asked)), np.arange(len(requests.local))
    return Split(asked, requests.send, given, requests.receive)


def split_late(
    side: SideGroup, requests: Requests, late: Bool[np.ndarray, "owned"]
) -> tuple[Split, Split]:
    """Part the rows of a step into those that can travel now and those that have to wait.

    Communication: an all-to-all of one byte for each requested row.

    Args:
        side: the ranks.
        requests: of the step.
        late: which of `requests.owned` an update yet to come changes.

    Returns:
        The early rows and the late ones.
    """
    given = late[requests.index]
    asked = side.exchange(given, requests.receive, requests.send)
    early = _chosen(requests, ~asked, ~given)
    return early, _chosen(requests, asked, given)


def map_neighbours(side: SideGroup, source: Source) -> dict[int, Reader]:
    """Readers of the rows of all ranks on this node (in this container), if these share memory.

    Communication: two all-gathers of a few hundred bytes, of ranks that share memory.

    Returns:
        By rank; this one is among them, always.

    Raises:
        RuntimeError: a rank cannot map the memory of another; on all ranks alike.
    """
    readers: dict[int, Reader] = {side.rank: source}
    if side.ranks == 1 or source.shared is None:
        return readers
    here, problem = _node(), ""
    for rank, (where, shared) in enumerate(_gather_objects(side, (here, source.shared))):
        if where == here and rank != side.rank:
            try:
                readers[rank] = shared.open()
            except ValueError as error:
                problem = f"rank {side.rank} of the group cannot map rows of rank {rank}: {error}"
    if problems := "; ".join(filter(None, _gather_objects(side, problem))):
        raise RuntimeError(problems)
    return readers


def fetch(
    side: SideGroup,
    readers: Mapping[int, Reader],
    requests: Requests,
    split: Split,
    out: Float[np.ndarray, "unique width"],
) -> None:
    """Bring some of the rows that this rank asked for to where they belong in `out`.

    Communication: an all-to-all of rows, if there are ranks whose rows cannot be read directly.

    Args:
        side: the ranks.
        readers: of the rows that can, by rank.
        requests: of the step.
        split: which rows.
        out: has a row for each in `requests.asked`.
    """
    ends = np.cumsum(split.send)
    for rank, reader in readers.items():
        at = split.asked[ends[rank] - split.send[rank] : ends[rank]]
        rows = np.empty((len(at), out.shape[1]), out.dtype)
        reader.gather(requests.asked[at], rows)
        out[at] = rows
    far = far_ranks(side, readers)
    if far.any():
        given = split.given[np.repeat(far, split.receive)]
        rows = np.empty((len(given), out.shape[1]), out.dtype)
        readers[side.rank].gather(requests.local[given], rows)
        at = split.asked[np.repeat(far, split.send)]
        out[at] = side.exchange(rows, split.receive * far, split.send * far)


def far_ranks(side: SideGroup, readers: Mapping[int, Reader]) -> Bool[np.ndarray, "ranks"]:
    """Ranks from which rows travel."""
    far = np.ones(side.ranks, np.bool_)
    far[list(readers)] = False
    return far


def _chosen(requests: Requests, asked: NDArray[np.bool_], given: NDArray[np.bool_]) -> Split:
    return Split(
        np.flatnonzero(asked),
        _counts(asked, requests.send),
        np.flatnonzero(given),
        _counts(given, requests.receive),
    )


def _counts(chosen: NDArray[np.bool_], splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of each rank's consecutive items are chosen."""
    before = np.append(0, np.cumsum(chosen))
    counts: NDArray[np.int64] = np.diff(before[np.append(0, np.cumsum(splits))])
    return counts


def _node() -> tuple[str, str]:
    """The same where one process can map the memory of another: one system, one container."""
    system = Path("/proc/sys/kernel/random/boot_id").read_text()
    return system, str(Path("/proc/self/ns/pid").readlink())


def _gather_objects(side: SideGroup, item: object) -> list[Any]:
    items = [None] * side.ranks
    dist.all_gather_object(items, item, group=side.group)
    return items
