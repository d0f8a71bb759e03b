"""The table service on one rank: the plain course, the order of calls, jobs, and errors that are final."""

from concurrent.futures import Future

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.engram_plan import plan_step
from parallel.engram_service import TableService
from parallel.engram_thread import EngramServiceError
from tests.engram_steps import (
    PLACES,
    ROWS,
    WIDTH,
    Master,
    is_skipped,
    lanes,
    plain_course,
    run_rank,
    same_reads,
    step_ids,
    step_plan,
)
from tests.engram_store import PlainStore

UPDATE = {"learning_rate": 0.1, "scale": 1.0}
PLAN = step_plan(0, 0, 1, lanes)[0]
ONES = np.ones((*PLAN.inverse.shape, WIDTH), np.float32)


def service_of(store: PlainStore) -> TableService[PlainStore]:
    return TableService(store, None, prefetch="exact", timeout_seconds=5.0)


@pytest.mark.parametrize("master", ["float32", "float64"])
def test_one_rank_needs_no_group(master: Master) -> None:
    store = PlainStore(ROWS, WIDTH, master=np.dtype(master).type)
    course, expected = run_rank(store, None, "exact", lanes, 8), plain_course(8, master)
    assert same_reads(course, expected, 0, 1, lanes)
    assert np.array_equal(store.table, expected.table)
    assert course.squares == pytest.approx(expected.squares, rel=1e-12)
    assert course.stats.fetch_bytes == course.stats.gradient_bytes == 0


@pytest.mark.parametrize("independent", [True, False])
def test_rows_that_the_next_step_waits_for_are_updated_first(independent: bool) -> None:
    """Where an update of a row needs other rows, all are updated at once, with the same bits."""
    store = PlainStore(ROWS, WIDTH)
    store.rows_are_independent = independent
    course, expected = run_rank(store, None, "exact", lanes, 8), plain_course(8)
    assert same_reads(course, expected, 0, 1, lanes)
    assert np.array_equal(store.table, expected.table)
    calls = []
    for step in range(8):
        now = np.unique(step_ids(step))
        first = len(np.intersect1d(now, step_ids(step + 1))) if step < 7 else 0
        if not is_skipped(step):
            calls += [first, len(now) - first] if independent else [len(now)]
    assert store.updates == calls


def test_calls_out_of_order_are_refused_and_harmless() -> None:
    service = service_of(PlainStore(ROWS, WIDTH))
    with pytest.raises(RuntimeError, match=r"rows of step 3, but the steps \[\] are announced"):
        service.rows(3)
    service.announce(3, PLAN)
    with pytest.raises(RuntimeError, match="update of step 3 needs its gradients"):
        service.update(3, **UPDATE)
    service.announce(4, PLAN)
    with pytest.raises(RuntimeError, match=r"step 5 is announced while steps \[3, 4\] run"):
        service.announce(5, PLAN)
    with pytest.raises(RuntimeError, match=r"reduce of step 4, but the steps \[3, 4\]"):
        service.reduce(4, ONES)
    with pytest.raises(ValueError, match=r"gradients of step 3 are float64 .* want float32"):
        service.reduce(3, ONES.astype(np.float64))
    with pytest.raises(ValueError, match=r"the plan and the rows want float32 \(24, 3, 4\)"):
        service.reduce(3, ONES[1:])
    places, limits = PLACES[:1], np.zeros(1, np.int8)
    larger = plan_step(np.array([[ROWS]]), places, limits, num_rows=ROWS + 1, ranks=1)
    with pytest.raises(ValueError, match=f"up to row {ROWS}; here 1 ranks share {ROWS} rows"):
        service.lookup(larger)
    two = plan_step(np.array([[0]]), places, limits, num_rows=ROWS, ranks=2)
    with pytest.raises(ValueError, match="a plan for 2 ranks"):
        service.lookup(two)
    assert service.error is None
    times = np.bincount(PLAN.inverse.reshape(-1))
    assert service.reduce(3, ONES) == (times**2).sum() * WIDTH
    service.update(3, **UPDATE)
    assert (service.rows(4) < 0).all()
    service.skip(4)
    service.close()
    with pytest.raises(RuntimeError, match="the tables of rank 0 are closed"):
        service.announce(5, PLAN)


def test_a_skipped_step_leaves_the_rows_and_frees_the_next() -> None:
    store = PlainStore(ROWS, WIDTH)
    service = service_of(store)
    service.announce(0, PLAN)
    service.announce(1, PLAN)
    service.reduce(0, ONES)
    service.skip(0)
    assert not service.rows(1).any()
    service.skip(1)
    service.announce(0, PLAN)  # the same numbers again, as after a return to a checkpoint
    assert not service.rows(0).any()
    service.close()
    assert store.updates == []


def test_jobs_run_between_updates_and_fail_alone() -> None:
    service = service_of(PlainStore(ROWS, WIDTH))
    tables: list[Future[NDArray[np.floating]]] = []
    for step in range(2):
        service.announce(step, PLAN)
        service.reduce(step, ONES)
        service.update(step, **UPDATE)
        tables.append(service.submit(lambda store: store.table.copy()))
        failed = service.submit(lambda store: store.table[ROWS])
        with pytest.raises(IndexError, match="out of bounds"):
            failed.result()
    first, second = (table.result()[PLAN.rows] for table in tables)
    assert (first < 0).all()
    assert (second < first).all()
    assert service.error is None
    service.close()


def test_the_first_failure_is_final() -> None:
    class Broken(PlainStore):
        def prefault(self, local: NDArray[np.int64], /) -> None:
            if len(local) < len(PLAN.rows):
                raise OSError("no such page")

    service = service_of(Broken(ROWS, WIDTH))
    service.announce(0, PLAN)
    service.announce(1, step_plan(3, 0, 1, lanes)[0])
    with pytest.raises(
        EngramServiceError, match="rank 0 failed in announce of step 1: no such"
    ) as e:
        service.lookup(PLAN)
    for call in (
        lambda: service.rows(0),
        lambda: service.reduce(0, ONES),
        lambda: service.update(0, **UPDATE),
        lambda: service.skip(0),
        lambda: service.announce(2, PLAN),
        lambda: service.submit(lambda store: store.table),
    ):
        with pytest.raises(EngramServiceError) as again:
            call()
        assert again.value is e.value is service.error
    assert isinstance(e.value.__cause__, OSError)
    service.close()
    service.close()
