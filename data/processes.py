"""Spreads work on shards over processes: `data.foreign` and `data.verify` call this."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
_BYTES_PER_PROCESS = 64 * 2**20


def work_through(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    sizes: Sequence[int],
    *,
    description: str,
    progress: bool,
) -> Iterator[Result]:
    """Yield what `work` returns for each task, in their order.

    One process for each 64 MiB, up to one for each processor; the calling process does the work
    itself where that is one.

    Args:
        work: a function of a module, for other processes import it.
        tasks: can be pickled, as can the results.
        sizes: bytes that each task reads.
        description: of the progress bar.
        progress: show it, on stderr.

    Raises:
        Exception: what `work` raised; the tasks that have not begun are dropped.
    """
    most = min(os.cpu_count() or 1, len(tasks))
    processes = min(most, 1 + sum(sizes) // _BYTES_PER_PROCESS)
    with tqdm(
        desc=description, total=sum(sizes), unit="B", unit_scale=True, disable=not progress
    ) as bar:
        results = map(work, tasks) if processes <= 1 else _spread(work, tasks, processes)
        for size, result in zip(sizes, results, strict=True):
            bar.update(size)
            yield result


def _spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    # Not forked: the parent may have threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker) as pool:
        try:
            yield from pool.map(work, tasks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker() -> None:
    """What every worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the parent tells
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its workers would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
