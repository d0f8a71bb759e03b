"""Which rank does what: pure arithmetic, no torch, so that `launch` answers without importing it.

`launch` checks and plans with it, every rank finds its place with it, and `parallel.mesh` builds the
same thing out of process groups. The ranks of a world are numbered row-major over the dense axes

    pp, dp_replicate, dp_shard, cp, tp        the last varies fastest

and, because an expert layer cuts the same ranks another way, over the expert axes `pp, edp, ep`:
ranks of one `ep` group hold different experts, those of one `edp` group the same ones.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.config import ParallelConfig

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep")
SEQUENCE_AXES = ("cp", "tp")
"""Axes over which the tokens of a sequence are spread."""
STAGE_AXES = ("dp_replicate", "dp_shard", "cp", "tp")
"""Axes within one pipeline stage."""
_SIZE_OF_AXIS = {
    "pp": "pipeline",
    "dp_replicate": "data_replicate",
    "dp_shard": "data",
    "cp": "context",
    "tp": "tensor",
    "edp": "expert_data_parallel_size",
    "ep": "expert",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Sizes of the axes. Sizes that do not fit together are reported by `problems`."""

    pipeline: int = 1
    data_replicate: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    whole_experts: bool = False
    """Every rank keeps its experts whole, instead of sharding them over those that hold the same."""

    @classmethod
    def from_config(cls, config: ParallelConfig) -> "ParallelLayout":
        """The layout that a recipe asks for."""
        return cls(
            pipeline=config.pipeline_parallel_size,
            data_replicate=config.data_replicate_parallel_size,
            data=config.data_parallel_size,
            context=config.context_parallel_size,
            tensor=config.tensor_parallel_size,
            expert=config.expert_parallel_size,
            whole_experts=config.expert_sharding == "replicate",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: all that hold a part of the same layers."""
        return self.data_replicate * self.data * self.context * self.tensor

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that share the same experts."""
        return self.stage_size // self.expert

    @property
    def expert_replicate(self) -> int:
        """Copies of the experts' parameters: those of the other parameters where they divide.

        Expert groups that span copies leave none to keep apart, and the experts are sharded over all.
        Whole experts are as many copies as there are ranks that hold them.
        """
        if self.whole_experts:
            return self.expert_data_parallel_size
        per_copy = self.stage_size // self.data_replicate
        return self.data_replicate if per_copy % self.expert == 0 else 1

    def size(self, axis: str) -> int:
        """Ranks along a dense or expert axis, by its name in a mesh."""
        return int(getattr(self, _SIZE_OF_AXIS[axis]))

    def coordinates(self, rank: int, axes: Sequence[str] = DENSE_AXES) -> dict[str, int]:
        """Place of a rank on each axis.

        Args:
            rank: global rank.
            axes: `DENSE_AXES` or `EXPERT_AXES`.
        """
        place: dict[str, int] = {}
        for axis in reversed(axes):
            rank, place[axis] = divmod(rank, self.size(axis))
        assert rank == 0, f"rank is beyond the world of {self.world_size}"
        return {axis: place[axis] for axis in axes}

    def rank(self, place: dict[str, int], axes: Sequence[str] = DENSE_AXES) -> int:
        """The rank at a place: the inverse of `coordinates`."""
        rank = 0
        for axis in axes:
            assert 0 <= place[axis] < self.size(axis), f"{axis}={place[axis]}"
            rank = rank * self.size(axis) + place[axis]
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """Ranks that differ in `axes` only, for every value of the other axes.

        Args:
            axes: dense or expert axes, outermost first: `groups("ep")`, `groups(*SEQUENCE_AXES)`.

        Returns:
            Groups in the order of their first ranks; every rank is in exactly one.
        """
        family = DENSE_AXES if set(axes) <= set(DENSE_AXES) else EXPERT_AXES
        others = [axis for axis in family if axis not in axes]

        def places(names: Sequence[str]) -> list[dict[str, int]]:
            ranges = (range(self.size(axis)) for axis in names)
            return [dict(zip(names, place, strict=True)) for place in itertools.product(*ranges)]

        return [
            [self.rank(fixed | moving, family) for moving in places(axes)]
            for fixed in places(others)
        ]

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different sequences."""
        return self.data_replicate * self.data

    def data_rank(self, rank: int) -> int:
        """Index of a rank among those that see different sequences."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.data + place["dp_shard"]

    def problems(self, num_experts: int | None = None) -> list[str]:
        """What is wrong with the layout, all at once, each with what to type instead.

        Args:
            num_experts: routed experts of a layer; None or 0 for a model without any.

        Returns:
            One line `parallel.<key>=<value>: <rule>; <fix>` per violation; empty if it is fine.
        """
        sizes = {
            "pipeline": self.pipeline,
            "data_replicate": self.data_replicate,
            "data": self.data,
            "context": self.context,
            "tensor": self.tensor,
            "expert": self.expert,
        }
        found = [
            f"parallel.{name}_parallel_size={size}: must be at least 1; use 1"
            for name, size in sizes.items()
            if size < 1
        ]
        if min(sizes.values()) >= 1:
            found += self._expert_problems(num_experts or 1)
        return found

    def _expert_problems(self, num_experts: int) -> list[str]:
        """The rule of the expert axis, for sizes of at least 1."""
        common = math.gcd(self.stage_size, num_experts)
        if common % self.expert == 0:
            return []
        legal = [size for size in range(1, common + 1) if common % size == 0]
        return [
            f"parallel.expert_parallel_size={self.expert}: must divide both "
            f"parallel.data_parallel_size*data_replicate*context*tensor={self.stage_size} and "
            f"model.moe.num_experts={num_experts}; use {either(legal)}"
        ]


def either(values: list[int]) -> str:
    """Values for a sentence: `1`, `1 or 2`, `1, 2 or 4`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
