"""Engram's table service on several ranks: the same bits as plain numpy on one, and clean failures."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.engram_service import TableService
from parallel.engram_thread import EngramServiceError
from tests.engram_steps import (
    ROWS,
    WIDTH,
    Spread,
    lanes,
    plain_course,
    run_rank,
    same_reads,
    scattered,
    step_ids,
    step_plan,
    zigzag,
)
from tests.engram_store import PlainStore
from tests.harness import run_distributed

STEPS = 50


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Ranks are forked: what is compiled here is not compiled again in each."""
    run_rank(PlainStore(ROWS, WIDTH), None, "exact", lanes, 2)


def prefetch_rank(rank: int, ranks: int) -> dict[str, Any]:
    expected, results = plain_course(STEPS), {}
    group = dist.new_group(list(range(ranks)))
    for prefetch in ("off", "exact", "stale"):
        store = PlainStore(ROWS, WIDTH, rank=rank, ranks=ranks)
        course = run_rank(store, group, prefetch, scattered, STEPS, pause=0.002)
        reads = same_reads(course, expected, rank, ranks, scattered)
        table = np.array_equal(store.table, expected.table[rank::ranks])
        results[prefetch] = reads, table, course.squares, course.stats
    return results


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_and_table_do_not_depend_on_prefetch(ranks: int) -> None:
    """Random sleeps, ranks without tokens, steps with one owner, skipped steps; `stale` must differ."""
    results = run_distributed(prefetch_rank, ranks, ranks)
    for prefetch in ("off", "exact"):
        assert [result[prefetch][:2] for result in results] == [(True, True)] * ranks, prefetch
        squares = np.sum([result[prefetch][2] for result in results], axis=0)
        assert np.allclose(squares, plain_course(STEPS).squares, rtol=1e-12, atol=0)
    assert not all(result["stale"][0] for result in results)
    assert not any(result["stale"][1] for result in results)
    for rank, result in enumerate(results):
        check_stats(rank, ranks, {prefetch: seen[3] for prefetch, seen in result.items()})


def check_stats(rank: int, ranks: int, stats: dict[str, Any]) -> None:
    plans = [step_plan(step, rank, ranks, scattered)[0] for step in range(STEPS)]
    late = sum(
        len(np.intersect1d(plan.rows, step_ids(step))) for step, plan in enumerate(plans[1:])
    )
    foreign = sum(int((plan.rows % ranks != rank).sum()) for plan in plans)
    for prefetch, seen in stats.items():
        assert seen.unique_rows == sum(len(plan.rows) for plan in plans)
        assert seen.occurrences == sum(plan.inverse.size for plan in plans)
        assert seen.fetch_bytes == foreign * WIDTH * 4
        assert seen.late_rows == (late if prefetch == "exact" else 0)
        assert seen.gradient_bytes >= seen.fetch_bytes
        assert 0 <= seen.hidden_seconds <= seen.fetch_seconds
    assert stats["off"].hidden_seconds == 0.0 < stats["off"].waited_seconds
    assert stats["exact"].hidden_seconds > 0.0


def owners_rank(rank: int, steps: int) -> list[Any]:
    expected, results = plain_course(steps), list[Any]()
    for ranks in (1, 2, 3, 4, 8):
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            spreads: list[Spread] = [lanes, zigzag, scattered]
            for spread in spreads:
                store = PlainStore(ROWS, WIDTH, rank=rank, ranks=ranks)
                course = run_rank(store, group, "exact", spread, steps)
                reads = same_reads(course, expected, rank, ranks, spread)
                table = np.array_equal(store.table, expected.table[rank::ranks])
                results.append((ranks, spread.__name__, reads, table))
    return results


@pytest.mark.slow
def test_the_table_is_the_same_for_any_number_of_owners() -> None:
    results = run_distributed(owners_rank, 8, 12)
    assert sum(len(of_rank) for of_rank in results) == 3 * (1 + 2 + 3 + 4 + 8)
    assert [r for of_rank in results for r in of_rank if not (r[2] and r[3])] == []


def lookup_rank(rank: int) -> bool:
    """A lookup of other rows while the next step's travel; and one in the middle of a step."""
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    store = PlainStore(ROWS, WIDTH, rank=rank, ranks=2)
    store.table[:] = np.arange(ROWS)[rank::2, None]
    service = TableService(store, group, prefetch="exact", timeout_seconds=10.0)
    plans = [step_plan(step, rank, 2, lanes)[0] for step in range(3)]
    service.announce(0, plans[0])
    before = service.lookup(plans[2])
    service.announce(1, plans[1])
    assert np.array_equal(before, np.repeat(plans[2].rows[:, None], WIDTH, 1))
    shape = (*plans[0].inverse.shape, WIDTH)
    service.reduce(0, np.ones(shape, np.float32))
    service.update(0, learning_rate=0.25, scale=1.0)
    after = service.lookup(plans[2])
    read = service.rows(1)
    touched = np.isin(plans[2].rows, step_ids(0))
    assert np.array_equal(after != before, np.repeat(touched[:, None], WIDTH, 1))
    both = np.intersect1d(plans[1].rows, plans[2].rows, return_indices=True)
    service.close()
    return np.array_equal(read[both[1]], after[both[2]]) and len(both[0]) > 0


def test_lookups_see_the_last_update_and_disturb_nothing() -> None:
    assert all(run_distributed(lookup_rank, 2))


def mismatch_rank(rank: int) -> list[str]:
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    texts = []
    for wrong in ("job", "step", "missing"):
        store = PlainStore(ROWS, WIDTH, rank=rank, ranks=2)
        service = TableService(store, group, prefetch="exact", timeout_seconds=0.5)
        plan = step_plan(0, rank, 2, lanes)[0]
        service.announce(0, plan)
        if wrong == "job" and rank:
            service.skip(0)
        elif wrong == "step" and rank:
            service.announce(2, plan)
        elif rank == 0:
            service.announce(1, plan)
        with pytest.raises(EngramServiceError) as caught:
            service.lookup(plan)
        texts.append(str(caught.value))
        service.close()
    return texts


def test_ranks_at_different_jobs_fail_with_both_named() -> None:
    zero, one = run_distributed(mismatch_rank, 2)
    for text, job in zip(zero, ("skip of step 0", "announce of step 2", None), strict=True):
        assert "side group of rank 0 failed in announce of step 1" in text
        assert "resume the run from its last checkpoint" in text
        if job:
            assert f"rank 0 of the group is at announce of step 1, rank 1 at {job}" in text
    assert "rank 1 of the group is at skip of step 0, rank 0 at announce of step 1" in one[0]


def victim_rank(
    rank: int, ranks: int, store: str, timeout: float, queue: "Queue[tuple[int, str, Any]]"
) -> None:
    """Train until the service fails, report how, and end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = dist.new_group(timeout=timedelta(seconds=60))
    assert isinstance(group, dist.ProcessGroup)
    rows = PlainStore(ROWS, WIDTH, rank=rank, ranks=ranks)
    service = TableService(rows, group, prefetch="exact", timeout_seconds=timeout)
    plan = step_plan(0, rank, ranks, lanes)[0]
    gradients = np.ones((*plan.inverse.shape, WIDTH), np.float32)
    service.announce(0, plan)
    try:
        for step in range(10**9):
            service.rows(step)
            service.announce(step + 1, plan)
            service.reduce(step, gradients)
            service.update(step, learning_rate=0.1, scale=1.0)
            if step == 20:
                queue.put((rank, "ready", None))
    except EngramServiceError as error:
        first, at = error, time.time()
    calls: list[Callable[[], object]] = [
        lambda: service.rows(step),
        lambda: service.submit(lambda store: store.table.copy()),
        lambda: service.lookup(plan),
        lambda: service.skip(step),
    ]
    again = []
    for call in calls:
        try:
            call()
        except EngramServiceError as error:
            again.append(error is first is service.error)
    service.close()
    queue.put((rank, str(first), (at, again, time.time() - at)))
    queue.close()
    queue.join_thread()
    os._exit(0)  # destroying the group would wait for the rank that has gone


def run_victims(
    directory: Path, ranks: int, timeout: float, what: signal.Signals
) -> dict[int, tuple[str, float, list[bool], float]]:
    """Signal rank 1 in mid-training; what the others say: error, after how long, later calls, close."""
    context = multiprocessing.get_context("fork")
    queue: Queue[tuple[int, str, Any]] = context.Queue()
    store = str(directory / f"store-{what.name}")
    processes = [
        context.Process(target=victim_rank, args=(rank, ranks, store, timeout, queue))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        assert {queue.get(timeout=30)[0] for _ in range(ranks)} == set(range(ranks))
        pid, start = processes[1].pid, time.time()
        assert pid is not None
        os.kill(pid, what)
        answers = [queue.get(timeout=20) for _ in range(ranks - 1)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {rank: (text, at - start, again, end) for rank, text, (at, again, end) in answers}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_killed_rank_fails_all_others_soon(ranks: int, tmp_path: Path) -> None:
    answers = run_victims(tmp_path, ranks, 30.0, signal.SIGKILL)
    assert sorted(answers) == [rank for rank in range(ranks) if rank != 1]
    for rank, (text, seconds, again, end) in answers.items():
        assert re.search(f"side group of rank {rank} failed in .* of step", text), text
        assert "resume the run from its last checkpoint" in text
        assert seconds < 10.0, "not the timeout, which is 30 s"
        assert again == [True] * 4
        assert end < 1.0


@pytest.mark.slow
def test_a_stopped_rank_fails_the_others_after_the_timeout(tmp_path: Path) -> None:
    answers = run_victims(tmp_path, 3, 2.0, signal.SIGSTOP)
    for text, seconds, again, end in answers.values():
        assert "resume the run from its last checkpoint" in text
        assert 1.9 < seconds < 15.0
        assert again == [True] * 4
        assert end < 1.0
