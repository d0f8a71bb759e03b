"""Which axes make a layout differ: found by running layouts with some of its axes. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.layouts import TypedLayout

Differs = Callable[[TypedLayout], bool | None]
"""Whether a layout differs from one rank; None if there is no such layout."""


@dataclass(frozen=True)
class Blame:
    """The axes without which the layout would compute the same."""

    axes: tuple[str, ...]
    each_alone: bool = False
    """Each of several axes differs by itself; else only all of them together do."""

    def __str__(self) -> str:
        if not self.axes:
            return "no axis: one rank differs from itself"
        if self.each_alone:
            return f"{' and '.join(self.axes)}, each alone"
        return " together with ".join(self.axes)


def blame(layout: TypedLayout, differs: Differs) -> Blame:
    """The smallest set of axes that differs, for a layout that does.

    First each axis alone. Experts need ranks to be spread over: `ep4` alone is `dp4,ep4`, beside
    `dp4`. If no axis differs alone, axes are left out one after the other for as long as the rest
    still differs: without any one of those that remain, all is well.

    Args:
        layout: differs from one rank.
        differs: is asked about other layouts; answers for the same one are taken as cheap.
    """
    axes = layout.axes
    if len(axes) < 2:
        return Blame(axes)
    alone = tuple(axis for axis in axes if axis != "ep" and differs(layout.only(axis)))
    if alone:
        return Blame(alone, each_alone=len(alone) > 1)
    if "ep" in axes:
        carried = spread_experts(layout)
        if differs(carried) and differs(carried.only("dp")) is False:
            return Blame(("ep",))
    rest = layout
    for axis in axes:
        others = tuple(other for other in rest.axes if other != axis)
        if len(others) > 1 and differs(rest.only(*others)):
            rest = rest.only(*others)
    return Blame(rest.axes)


def spread_experts(layout: TypedLayout) -> TypedLayout:
    """The layout's expert axis over as many data ranks, and nothing else."""
    size = dict(layout.sizes)["ep"]
    return TypedLayout((("dp", size), ("ep", size)))


def suspects(layout: TypedLayout) -> list[TypedLayout]:
    """All layouts that `blame` may ask about."""
    if len(layout.axes) < 2:
        return []
    parts = list(layout.parts())
    if "ep" in layout.axes:
        carried = spread_experts(layout)
        parts += [carried, carried.only("dp")]
    return parts
