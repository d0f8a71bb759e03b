"""The bubble that the benchmark predicts from an order of passes, against the formulas of papers."""

import pytest

from parallel.config import ParallelConfig
from parallel.pipeline_order import passes
from tests.benchmarks.of_parallel.schedule import Action, bubble


def orders(ranks: int, microbatches: int, turns: int) -> list[list[Action]]:
    """As torch's schedules run them, microbatches numbered in the order of their passes."""
    config = ParallelConfig(
        pipeline_parallel_size=ranks,
        pipeline_stages_per_rank=turns,
        pipeline_schedule="1f1b" if turns == 1 else "interleaved_1f1b",
    )
    found = []
    for rank in range(ranks):
        done: dict[tuple[str, int], int] = {}
        order = []
        for one in passes(config, rank, microbatches):
            number = done.get((one.kind, one.turn), 0)
            done[one.kind, one.turn] = number + 1
            order.append(Action(one.kind, one.turn * ranks + rank, number))
        found.append([*order, *(Action("sum", t * ranks + rank, 0) for t in range(turns))])
    return found


def seconds(
    orders: list[list[Action]], forward: float, backward: float, total: float
) -> dict[Action, float]:
    times = {"forward": forward, "backward": backward, "sum": total}
    return {action: times[action.kind] for order in orders for action in order}


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 8), (8, 8)])
@pytest.mark.parametrize("turns", [1, 2])
def test_equal_passes_have_the_bubble_of_the_paper(
    ranks: int, microbatches: int, turns: int
) -> None:
    """(p - 1) / (v m + p - 1), Narayanan et al. 2021, sec. 2.2; sums add to the time of all ranks."""
    order = orders(ranks, microbatches, turns)
    expected = (ranks - 1) / (turns * microbatches + ranks - 1)
    found = bubble(order, seconds(order, 1.0, 2.0, 0.0), ranks * turns)
    assert found == pytest.approx(expected, rel=1e-12)


def test_transfers_and_sums_lengthen_the_way_of_the_last_gradient() -> None:
    """By hand: forward, a transfer each way, the last of three backward passes, and the sum after it."""
    order = orders(2, 3, 1)
    found = bubble(order, seconds(order, 1.0, 2.0, 5.0), 2, transfer=0.25)
    # Rank 0: F0 0-1, F1 1-2, then B0 from 4.5 (F0 there 1.25-2.25, B0 there to 4.25), F2 6.5-7.5,
    # B1 from 7.5 (there 5.25-7.25), B2 from 11.0 (F2 there 7.75-8.75, B2 there to 10.75), sum to 18.
    busy = 2 * (3 * (1.0 + 2.0) + 5.0)
    assert found == pytest.approx(1 - busy / (2 * 18.0), rel=1e-12)
