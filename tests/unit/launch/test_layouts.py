import pytest

from launch.compose import compose
from launch.layouts import AXES, TypedLayout, key
from parallel.layout import ParallelLayout


def test_a_layout_is_axes_with_sizes() -> None:
    layout = TypedLayout.parse("pp2, dpr2,dp3,ep4,tp1")
    assert str(layout) == "pp2,dpr2,dp3,ep4,tp1"
    assert layout.axes == ("pp", "dpr", "dp", "ep")
    assert layout.data_size == 6
    assert str(layout.only("ep", "pp")) == "pp2,ep4"
    assert str(layout.without("dp")) == "pp2,dpr2,ep4,tp1"


def test_a_layout_is_a_recipe_of_that_layout() -> None:
    overrides = TypedLayout.parse("dpr2,dp2,ep4").overrides()
    assert len(overrides) == len(AXES)
    config = compose("v4_nano", overrides).config
    expected = ParallelLayout(data_replicate=2, data=2, expert=4)
    assert ParallelLayout.from_config(config.parallel) == expected
    one_rank = compose("v4_nano", TypedLayout().overrides()).config
    assert ParallelLayout.from_config(one_rank.parallel) == ParallelLayout()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": an axis (dp, dpr, tp, pp, cp, ep) and its size, such as dp2,ep2"),
        ("dp", "dp: an axis (dp, dpr, tp, pp, cp, ep) and its size, such as dp2"),
        ("tpp2", "tpp2: an axis (dp, dpr, tp, pp, cp, ep) and its size, such as tp2"),
        ("dp=2", "dp=2: an axis (dp, dpr, tp, pp, cp, ep) and its size, such as dp2"),
        ("edp2", "edp2: an axis"),
        ("dp2,dp4", "dp4: dp has a size already, dp2; use one"),
        ("dp0", "dp0: must be at least 1; use dp1 or more"),
        ("dp-2", "dp-2: an axis"),
    ],
)
def test_what_is_no_layout_says_how_to_type_one(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^--layout ") as caught:
        TypedLayout.parse(text)
    assert said in str(caught.value)


def test_all_mistakes_of_a_layout_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"^--layout") as caught:
        TypedLayout.parse("dp0,xp2,dp,tp2")
    assert [line.split(": ")[1] for line in str(caught.value).split("\n")] == ["dp0", "xp2", "dp"]


def test_keys_are_those_of_a_recipe() -> None:
    keys = compose("v4_nano").config.parallel.__dataclass_fields__
    assert {key(axis).removeprefix("parallel.") for axis in AXES} <= set(keys)
