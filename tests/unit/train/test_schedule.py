import math
from itertools import pairwise

import pytest

from train.config import OptimConfig
from train.optim.schedule import last_step_before_decay, learning_rate


def rates(schedule: str, steps: int = 100, warmup: int = 10) -> list[float]:
    config = OptimConfig(
        learning_rate=2.0,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup,
        final_fraction=0.1,
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


def test_cosine_may_follow_a_plateau_and_end_before_the_run() -> None:
    config = OptimConfig(
        learning_rate=2.0, warmup_steps=10, final_fraction=0.1, decay_fraction=0.4, decay_end=0.9
    )
    found = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert found[9:50] == [2.0] * 41
    assert found[50] < 2.0
    assert found[69] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[89:] == pytest.approx([0.2] * 11)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_decay_of_no_steps_never_comes(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=0, decay_fraction=0.0)  # type: ignore[arg-type]
    assert {learning_rate(config, step, 20) for step in range(1, 21)} == {config.learning_rate}


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 100), ("cosine", 10), ("step", 80), ("wsd", 80)]
)
def test_where_the_decay_begins(schedule: str, last: int) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=10)  # type: ignore[arg-type]
    assert last_step_before_decay(config, 100) == last
    assert learning_rate(config, last, 100) == config.learning_rate
    if last < 100:
        assert learning_rate(config, last + 1, 100) < config.learning_rate
