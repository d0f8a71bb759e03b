"""Which axes make a layout differ: found by running layouts with some of its axes. No torch."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
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

    First each axis alone. If none differs, axes are left out one after the other for as long as the
    rest still differs: without any one of those that remain, all is well.

    Args:
        layout: differs from one rank.
        differs: is asked about other layouts; a second question about the same one is cheap.
    """
    axes = layout.axes
    if len(axes) < 2:
        return Blame(axes)

    def some_differ(*some: str) -> bool:
        part = restrict(layout, some)
        if not differs(part):
            return False
        lent = "dp" in part.axes and "dp" not in some
        return not lent or differs(part.without("ep")) is False

    alone = tuple(axis for axis in axes if some_differ(axis))
    if alone:
        return Blame(alone, each_alone=len(alone) > 1)
    rest = axes
    for axis in axes:
        others = tuple(other for other in rest if other != axis)
        if len(others) > 1 and some_differ(*others):
            rest = others
    return Blame(rest)


def restrict(layout: TypedLayout, axes: Iterable[str]) -> TypedLayout:
    """The layout with some of its axes only.

    Experts are spread over the ranks of other axes. If those do not suffice, data ranks are lent:
    `ep4` alone is `dp4,ep4`.
    """
    part = layout.only(*axes)
    sizes = dict(part.sizes)
    if "ep" not in sizes or "dp" in sizes:
        return part
    stage = math.prod(sizes.get(axis, 1) for axis in ("dpr", "cp", "tp"))
    lent = sizes["ep"] // math.gcd(sizes["ep"], stage)
    return TypedLayout((("dp", lent), *part.sizes)) if lent > 1 else part


def suspects(layout: TypedLayout) -> Iterator[TypedLayout]:
    """All layouts that `blame` may ask about."""
    for number in range(1, len(layout.axes)):
        for axes in itertools.combinations(layout.axes, number):
            part = restrict(layout, axes)
            yield from (part, part.without("ep"))
