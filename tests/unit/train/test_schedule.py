import math
from itertools import pairwise

import pytest

from train.config import OptimConfig
from train.optim.schedule import learning_rate


def rates(schedule: str, steps: int = 100, warmup: int = 10) -> list[float]:
    config = OptimConfig(
        learning_rate=2.0,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup,
        final_fraction=0.1,
        decay_fraction=0.2,
    )
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "wsd"])
def test_warm_up_is_linear_from_zero_and_reaches_the_peak(schedule: str) -> None:
    found = rates(schedule)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(found) == pytest.approx(2.0)


def test_cosine_ends_at_the_final_fraction_and_is_half_way_in_the_middle() -> None:
    found = rates("cosine")
    assert found[-1] == pytest.approx(0.2)
    assert found[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert all(a >= b for a, b in pairwise(found[9:]))


def test_step_schedule_drops_at_80_and_90_percent() -> None:
    found = rates("step")
    assert found[79] == 2.0
    assert found[80] == pytest.approx(0.632)
    assert found[90] == pytest.approx(0.2)


def test_wsd_is_flat_then_linear() -> None:
    found = rates("wsd")
    assert found[79] == 2.0
    assert found[89] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[99] == pytest.approx(0.2)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates("constant", warmup=0)[0] == 2.0
