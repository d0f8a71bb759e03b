"""Run a function on several gloo ranks: forked, so that a two-rank test costs a tenth of a second."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from numba.core.registry import cpu_target

# What takes each rank half a second, taken before they fork: the default of torch, whose call imports
# modules, and what numba imports at its first function.
torch.use_deterministic_algorithms(False)
cpu_target.target_context.refresh()


def more(*values: Any) -> Any:
    """A case that shows no more than its neighbours together."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 50.0
) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` forked ranks with a gloo process group.

    Returns the results in rank order; results must pickle. An exception on any rank is raised here
    with that rank's traceback, and every rank is gone when this returns.
    """
    context = multiprocessing.get_context("fork")
    results: Queue[tuple[int, str | None, Any]] = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        ranks = [
            context.Process(
                target=_run_rank, args=(function, rank, world_size, store, results, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        answers: dict[int, tuple[str | None, Any]] = {}
        try:
            answers = _collect(results, world_size, timeout)
        finally:
            for process in ranks:
                process.join(2.0 if len(answers) == world_size else 0.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    errors = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(answers.items()) if error]
    if errors:
        raise AssertionError("\n".join(errors))
    if len(answers) < world_size:
        raise TimeoutError(f"only ranks {sorted(answers)} finished in {timeout} s")
    return [answers[rank][1] for rank in range(world_size)]


def fork_ranks(
    function: Callable[..., Any], world_size: int, store: Path, *args: Any
) -> list[ForkProcess]:
    """Start ranks as `run_distributed` does, and leave them to the caller.

    Args:
        function: called as `function(rank, *args)`.
        world_size: number of ranks.
        store: a file that does not exist, by which they meet.
        args: for the function.
    """
    context = multiprocessing.get_context("fork")
    results: Queue[tuple[int, str | None, Any]] = context.Queue()
    ranks = [
        context.Process(
            target=_run_rank, args=(function, rank, world_size, str(store), results, args)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _collect(
    results: "Queue[tuple[int, str | None, Any]]", world_size: int, timeout: float
) -> dict[int, tuple[str | None, Any]]:
    """Answers by rank; after an error the others get two seconds, for they may wait in a collective."""
    answers: dict[int, tuple[str | None, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < world_size and (wait := deadline - time.monotonic()) > 0:
        try:
            rank, error, value = results.get(timeout=wait)
        except Empty:
            break
        answers[rank] = (error, value)
        if error:
            deadline = min(deadline, time.monotonic() + 2.0)
    return answers


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    results: "Queue[tuple[int, str | None, Any]]",
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # A tenth of a rank's time: the shapes of the first and of the last one speak for the others'.
    jaxtyping.config.update("jaxtyping_disable", 0 < rank < world_size - 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        value = function(rank, *args)
        dist.barrier()
        results.put((rank, None, value))
        dist.destroy_process_group()
    except BaseException:  # the parent reports it
        results.put((rank, traceback.format_exc(), None))
