"""Batches ahead of time, in a thread; `data.loader` calls this, and whoever adds work to its batches."""

import threading
import weakref
from collections.abc import Iterator
from queue import Queue
from typing import TypeVar

import torch

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, of which a thread makes up to `depth` ahead; with 0 each is made when asked for.

    Collecting the result ends the thread. An error of `items` is raised where its item is asked for,
    and from then on; they must not end otherwise.
    """
    return _Prefetcher(items, depth) if depth else items


class _Prefetcher(Iterator[T]):
    """The thread ends with this object."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: Queue[T | Exception] = Queue(depth)
        self._error: Exception | None = None
        stop = threading.Event()
        # The thread must not hold this object, or it would never be collected.
        thread = threading.Thread(
            target=_produce, args=(items, self._queue, stop), name="data-loader", daemon=True
        )
        torch.get_num_threads()  # this thread's count is settled before the new thread's
        thread.start()
        self._close = weakref.finalize(self, _stop, thread, stop, self._queue)

    def __next__(self) -> T:
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, Exception):
                return item
            self._error = item
        raise self._error


def _produce(items: Iterator[T], queue: "Queue[T | Exception]", stop: threading.Event) -> None:
    # As in `parallel.engram_thread`: the model's team of OpenMP threads stays the only one.
    torch.set_num_threads(1)
    while not stop.is_set():
        try:
            queue.put(next(items))
        except Exception as error:  # the consumer raises it
            queue.put(error)
            return


def _stop(thread: threading.Thread, stop: threading.Event, queue: "Queue[T | Exception]") -> None:
    """Runs when the prefetcher is collected, and before the interpreter exits."""
    stop.set()
    # Room for the one item that the thread may still put before it looks at `stop`.
    while not queue.empty():
        queue.get_nowait()
    if thread is not threading.current_thread():  # a garbage collection may run in any thread
        thread.join()
