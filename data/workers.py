"""Work in processes of their own, whose results come back in a fixed order; `data.loader` calls this.

torch's DataLoader runs the processes and hands tensors over in shared memory, which is unlinked as
soon as it is made, so that a killed process leaves none behind.

The processes are forked from a server (`forkserver`) that imported torch and has done nothing else. A
fork of the rank itself would copy locks that its threads hold (gloo, autograd, the prefetching
thread) with no thread that releases them, and a parallel region of OpenMP in the child would wait
for threads that exist in the rank only.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Generic, TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")
Job: TypeAlias = Callable[[], Iterator[T]]
"""Makes items without end; can be pickled."""

_PRELOADED = ["data.loader"]
_FOR_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def in_processes(jobs: Sequence[Job[T]], depth: int) -> Iterator[list[T]]:
    """The items of each job, made in a process of its own.

    Args:
        jobs: one for each process.
        depth: items that a process makes ahead, at least 1.

    Yields:
        One item of each job, in the order of the jobs.

    Raises:
        RuntimeError: a process died; says which.
        Exception: what a job raised, with the process and its stack as a note.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with _stop_requests_blocked(), warnings.catch_warnings():
        # torch compares with the node's cores, which the recipe's author divided among the ranks.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        items = iter(
            DataLoader(
                _Items(jobs),
                batch_size=None,
                num_workers=len(jobs),
                prefetch_factor=max(1, depth),
                collate_fn=_as_it_is,
                multiprocessing_context=context,
                worker_init_fn=_end_with_the_rank,
                # Else it would draw a seed from the generator that the training uses.
                generator=torch.Generator(),
            )
        )
    return _whole(_in_turn(items, len(jobs)))


@dataclass(frozen=True)
class _Failure:
    """What a process sends in place of an item."""

    error: Exception
    note: str

    @classmethod
    def of(cls, error: Exception, worker: int) -> "_Failure":
        note = f"In data worker {worker} (pid {os.getpid()}):\n{traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever its constructor does with its own message
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, note)


class _Items(IterableDataset[T | _Failure], Generic[T]):
    """Iterated in each process: the items of its job."""

    def __init__(self, jobs: Sequence[Job[T]]) -> None:
        self._jobs = jobs

    def __iter__(self) -> Iterator[T | _Failure]:
        info = get_worker_info()
        assert info is not None, "runs in workers only"
        try:
            yield from self._jobs[info.id]()
        except Exception as error:  # raised again in the rank
            yield _Failure.of(error, info.id)


def _in_turn(
    items: Iterator[T | _Failure], workers: int
) -> Generator[list[T | _Failure], None, None]:
    while True:
        try:
            row = [next(items) for _ in range(workers)]
        except RuntimeError as error:
            raise RuntimeError(
                f"data.num_workers={workers}: {error}; a process that is killed has often run out "
                "of memory: use fewer workers, or data.prefetch_batches=1"
            ) from error
        yield row


def _whole(rows: Generator[list[T | _Failure], None, None]) -> Iterator[list[T]]:
    """The rows, of which one with a failure raises it."""
    for row in rows:
        for item in row:
            if isinstance(item, _Failure):
                # Ends the processes. Later the error would hold them until the garbage collector
                # comes, which destroys the queues that tell them before it tells them.
                rows.close()
                item.error.add_note(item.note)
                raise item.error
        yield [item for item in row if not isinstance(item, _Failure)]


@contextmanager
def _stop_requests_blocked() -> Iterator[None]:
    """Processes started here never see a request to stop.

    Slurm and a terminal send it to all processes of a job; only the rank ends its workers.
    """
    resource_tracker.ensure_running()  # as it starts, it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_RANK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_rank(worker: int) -> None:
    """End this process when the rank does or says so, however busy it is."""
    rank = multiprocessing.parent_process()
    assert rank is not None, worker
    assert rank.pid is not None, worker
    for wait in (rank.join, partial(_wait_for_order, rank.pid)):
        threading.Thread(target=_leave_after, args=(wait,), daemon=True).start()


def _wait_for_order(rank: int) -> None:
    """Until the rank sends SIGTERM, as Python does to its children when it exits."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
        pass


def _leave_after(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)


def _as_it_is(item: T) -> T:
    return item
