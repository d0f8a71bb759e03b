"""Controls of the size of another arm, against a search over all values."""

from functools import cache

import pytest

from launch.compose import RecipeError, compose
from launch.study_config import Control
from launch.study_size import Size, control_overrides, deviation, size_of
from train.config import RunConfig

NANO = ["parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"]
OFF = [*NANO, "model.engram=null"]


@cache
def recipe(*overrides: str) -> RunConfig:
    return compose("engram_nano", overrides).config


def size(*overrides: str) -> Size:
    return size_of(recipe(*overrides))


def test_the_control_has_the_nearest_number_of_experts() -> None:
    wanted = recipe(*NANO)
    control = Control(base="off", match="on", parameters="model.moe.num_experts")
    [found] = control_overrides(recipe(*OFF), control, wanted)
    target = size_of(wanted).parameters
    # Counted by hand from the shapes: gate and up, down, and a row of the router, in each MoE layer.
    hidden, width, layers = 128, 64, 3
    expert = layers * (3 * hidden * width + hidden)
    assert size(*OFF, "model.moe.num_experts=9").parameters - size(*OFF).parameters == expert
    eight = size(*OFF).parameters
    gaps = {count: abs(eight + (count - 8) * expert - target) for count in range(4, 40)}
    assert found == f"model.moe.num_experts={min(gaps, key=lambda count: gaps[count])}"
    assert gaps[int(found.partition("=")[2])] <= expert / 2


def test_parameters_and_flops_are_matched_together() -> None:
    wanted = size(*NANO)
    control = Control(
        base="off",
        match="on",
        parameters="model.moe.num_experts",
        flops="model.intermediate_size",
    )
    found = control_overrides(recipe(*OFF), control, recipe(*NANO))
    reached = size(*OFF, *found)
    # Another row of the dense layer makes 6 x 3 x 128 operations, another expert 74,112 parameters.
    assert abs(reached.flops_per_token - wanted.flops_per_token) <= 18 * 128 / 2
    assert abs(reached.parameters - wanted.parameters) <= 74_112 / 2
    assert deviation(101, 100) == "+1.00 %"


def test_values_that_a_layout_refuses_are_left_out() -> None:
    typed = ["model.engram=null"]  # on 4 ranks with experts over 2
    control = Control(base="off", match="on", parameters="model.moe.num_experts")
    [found] = control_overrides(recipe(*typed), control, recipe(*NANO))
    assert int(found.partition("=")[2]) % 2 == 0


def test_an_arm_may_shrink() -> None:
    control = Control(base="on", match="off", parameters="model.moe.num_experts")
    [found] = control_overrides(recipe(*NANO), control, recipe(*OFF))
    assert 2 <= int(found.partition("=")[2]) < 8


def test_rows_grow_to_the_next_prime_only() -> None:
    control = Control(base="on", match="more", parameters="model.engram.rows_per_head")
    target = recipe(*NANO, "model.engram.rows_per_head=2600")
    [found] = control_overrides(recipe(*NANO), control, target)
    assert int(found.partition("=")[2]) == pytest.approx(2600, rel=0.02)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.residual", r"model\.residual=mhc: a control varies a whole number"),
        ("train.global_batch_size", "the size does not grow with it"),
        ("model.moe.number", "a control varies a whole number"),
    ],
)
def test_a_key_that_gives_no_size_is_refused(key: str, message: str) -> None:
    control = Control(base="off", match="on", parameters=key)
    with pytest.raises(RecipeError, match=message):
        control_overrides(recipe(*OFF), control, recipe(*NANO))
