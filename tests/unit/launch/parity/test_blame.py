import pytest

from launch.layouts import TypedLayout
from launch.parity.blame import blame, restrict, suspects
from parallel.layout import ParallelLayout

EXPERTS = 8


def is_legal(layout: TypedLayout) -> bool:
    sizes = {"dp": 1, "dpr": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1} | dict(layout.sizes)
    found = ParallelLayout(
        pipeline=sizes["pp"],
        data_replicate=sizes["dpr"],
        data=sizes["dp"],
        context=sizes["cp"],
        tensor=sizes["tp"],
        expert=sizes["ep"],
    )
    return not found.problems(EXPERTS)


class Ranks:
    """Runs nothing; layouts that have all axes of one of the broken sets differ."""

    def __init__(self, *broken: str) -> None:
        self.broken = [frozenset(axes.split()) for axes in broken]
        self.asked: list[str] = []

    def __call__(self, layout: TypedLayout) -> bool | None:
        self.asked.append(str(layout))
        if not is_legal(layout):
            return None
        return any(axes <= set(layout.axes) for axes in self.broken)


@pytest.mark.parametrize(
    ("layout", "broken", "said"),
    [
        ("dp2", ["dp"], "dp"),
        ("dp1", [], "no axis: one rank differs from itself"),
        ("dp2,ep2", ["dp"], "dp"),
        ("dp2,ep2", ["ep"], "ep"),
        ("dp4,ep2", ["ep"], "ep"),
        ("tp2,ep2", ["ep"], "ep"),
        ("tp2,ep2", ["tp"], "tp"),
        ("tp2,ep2", ["tp ep"], "tp together with ep"),
        ("tp2,ep2", ["tp ep", "dp"], "tp together with ep"),
        ("pp2,dp2,tp2,ep4", ["tp"], "tp"),
        ("pp2,dp2,tp2,ep4", ["ep"], "ep"),
        ("pp2,dp2,tp2,ep4", ["pp", "tp"], "pp and tp, each alone"),
        ("pp2,dp2,tp2,ep4", ["pp ep"], "pp together with ep"),
        ("pp2,dp2,tp2,ep2", ["pp ep"], "pp together with ep"),
        ("tp2,ep4,pp2", ["pp dp", "tp ep pp"], "tp together with ep together with pp"),
        ("pp2,dp2,tp2,ep2", ["dp pp", "tp ep"], "tp together with ep"),
        ("cp2,dp2,tp2", ["cp dp tp"], "cp together with dp together with tp"),
    ],
)
def test_the_smallest_set_of_axes_is_blamed(layout: str, broken: list[str], said: str) -> None:
    ranks = Ranks(*broken)
    typed = TypedLayout.parse(layout)
    found = blame(typed, ranks)
    assert str(found) == said
    possible = {str(layout) for layout in suspects(typed)}
    assert set(ranks.asked) <= possible | {layout}


def test_one_axis_has_no_suspects() -> None:
    assert list(suspects(TypedLayout.parse("tp2"))) == []


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("ep", "dp8,ep8"),
        ("tp ep", "dp4,tp2,ep8"),
        ("tp cp ep", "dp2,cp2,tp2,ep8"),
        ("dp ep", "dp4,ep8"),
        ("pp tp", "pp2,tp2"),
    ],
)
def test_experts_are_lent_data_ranks(axes: str, expected: str) -> None:
    layout = TypedLayout.parse("pp2,dp4,cp2,tp2,ep8")
    assert str(restrict(layout, axes.split())) == expected
