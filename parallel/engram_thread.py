"""A thread that does jobs one after the other; `parallel.engram_service` keeps the tables in one.

The first job that fails ends it: everything that is waited for, and every later call, raises that error
at once, so that nothing waits for a rank that has gone.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class EngramServiceError(RuntimeError):
    """The tables of this rank can no longer be used: some ranks may be an update ahead of others."""


class JobThread:
    """First in, first out."""

    def __init__(self, owner: str) -> None:
        """Start the thread, for `owner` (in error texts); in a process that will not fork again."""
        self.owner = owner
        self.error: EngramServiceError | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any], str] | None] = SimpleQueue()
        self._promised: set[Future[Any]] = set()
        torch.get_num_threads()  # this thread's count is settled before the new thread's
        self._thread = threading.Thread(target=self._run, name="engram", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T], name: str, *, fatal: bool = True) -> "Future[T]":
        """Do a job after all earlier ones.

        Args:
            job: called in the thread.
            name: of the job, in error texts.
            fatal: whether its failure ends the thread; else its future alone raises.

        Raises:
            EngramServiceError: an earlier job failed.
            RuntimeError: after `close`.
        """
        with self._lock:
            future = self._promise()
            self._jobs.put((future, job, name if fatal else ""))
            return future

    def promise(self) -> "Future[Any]":
        """A future that some job will set; it raises if the thread fails before."""
        with self._lock:
            return self._promise()

    def check(self) -> None:
        """Raise what `submit` would raise now."""
        if self.error is not None:
            raise self.error
        if self._closed:
            raise RuntimeError(f"Engram: the tables of {self.owner} are closed")

    def close(self, timeout_seconds: float) -> None:
        """Take no more jobs and wait for those at hand; after a failure there are none."""
        with self._lock:
            if not self._closed:
                self._jobs.put(None)
            self._closed = True
        self._thread.join(timeout_seconds)

    def _promise(self) -> "Future[Any]":
        self.check()
        future: Future[Any] = Future()
        self._promised.add(future)
        future.add_done_callback(self._promised.discard)
        return future

    def _run(self) -> None:
        # A second team of OpenMP threads would outnumber the cores, and then the teams of libgomp sleep
        # at every barrier instead of spinning: on two cores, steps of `v4_nano` took 1.7 times as long.
        torch.set_num_threads(1)
        while (item := self._jobs.get()) is not None:
            future, job, name = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as cause:  # whoever waits raises it
                if name:
                    self._fail(name, cause)
                    return
                future.set_exception(cause)

    def _fail(self, name: str, cause: BaseException) -> None:
        error = EngramServiceError(
            f"Engram: the side group of {self.owner} failed in {name}: {cause}. Some ranks may have"
            f" made an update that others have not, so these tables are not used or saved any more;"
            f" resume the run from its last checkpoint"
        )
        error.__cause__ = cause
        with self._lock:
            self.error = error
        for future in tuple(self._promised):
            if not future.done():
                future.set_exception(error)
