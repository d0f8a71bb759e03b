"""Layouts as they are typed, `tp2,pp2,ep4`: axis and size, comma-joined. Pure text, no torch.

`mneme parity --layout` uses this. A layout becomes overrides of a recipe, so that all rules of a
recipe hold for it and are reported in the same words.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

AXES = {
    "dp": "data",
    "dpr": "data_replicate",
    "tp": "tensor",
    "pp": "pipeline",
    "cp": "context",
    "ep": "expert",
}
"""Axis -> the word in its key, `parallel.<word>_parallel_size`."""


@dataclass(frozen=True)
class TypedLayout:
    """Sizes of some axes, in the order in which they were typed; the others are 1."""

    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "TypedLayout":
        """Read `dp2,ep2`.

        Raises:
            ValueError: with everything that is wrong, a line each.
        """
        sizes: dict[str, int] = {}
        problems = []
        for word in text.split(","):
            found = re.fullmatch(r"([a-z]+)([0-9]+)", word.strip())
            axis, size = (found[1], int(found[2])) if found else (word, 0)
            if found is None or axis not in AXES:
                problems.append(f"{word}: {_expected(axis)}")
            elif axis in sizes:
                problems.append(f"{word}: {axis} has a size already, {axis}{sizes[axis]}; use one")
            elif size < 1:
                problems.append(f"{word}: must be at least 1; use {axis}1 or more")
            else:
                sizes[axis] = size
        if problems:
            raise ValueError("\n".join(f"--layout {text}: {line}" for line in problems))
        return cls(tuple(sizes.items()))

    def __str__(self) -> str:
        return ",".join(f"{axis}{size}" for axis, size in self.sizes)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes with more than one rank."""
        return tuple(axis for axis, size in self.sizes if size > 1)

    @property
    def data_size(self) -> int:
        """Ranks that see different sequences."""
        sizes = dict(self.sizes)
        return sizes.get("dp", 1) * sizes.get("dpr", 1)

    def only(self, *axes: str) -> "TypedLayout":
        """The same sizes of these axes, the others 1."""
        return TypedLayout(tuple((axis, size) for axis, size in self.sizes if axis in axes))

    def without(self, axis: str) -> "TypedLayout":
        """The same sizes, but 1 of this axis."""
        return self.only(*(other for other, _ in self.sizes if other != axis))

    def overrides(self) -> list[str]:
        """The layout as overrides of a recipe; every axis, so that those of the recipe do not stay."""
        sizes = dict(self.sizes)
        return [f"{key(axis)}={sizes.get(axis, 1)}" for axis in AXES]


def key(axis: str) -> str:
    """The recipe's key for the size of an axis."""
    return f"parallel.{AXES[axis]}_parallel_size"


def _expected(typed: str) -> str:
    nearest = get_close_matches(typed.rstrip("0123456789="), AXES, n=1)
    example = f"{nearest[0]}2" if nearest else "dp2,ep2"
    return f"an axis ({', '.join(AXES)}) and its size, such as {example}"
