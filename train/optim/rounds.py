"""Who orthogonalizes which matrix, and when: the plan that `muon` makes once and follows each step."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.owners import Job, Spread, balance
from parallel.shards import cut_dims
from parallel.volume import Axis
from train.optim.newton_schulz import flops

ROUND_ELEMENTS = 1 << 26
"""Elements that one rank orthogonalizes at a time (at least one matrix), and that it holds of the
matrices of others meanwhile: bounds the extra memory."""


@dataclass(frozen=True, eq=False)
class Matrices:
    """Matrices of one shape in a parameter that one rank orthogonalizes together."""

    parameter: nn.Parameter
    experts: range
    """Those of this rank whose matrices these are; the first where a parameter has no experts."""
    spread: Spread
    """How each of the matrices is spread over the ranks of the group."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each whole matrix."""
        return self.spread.matrix_shape

    def within(self, tensor: Tensor | None, rank: int) -> Tensor:
        """What this rank holds of the matrices, `[count, rows here, columns here]`.

        Args:
            tensor: the parameter, its gradient or a state of its shape.
            rank: this rank in the group.
        """
        local, part = local_part(tensor), self.spread.part(rank)
        local = local if local.ndim == 3 else local.unsqueeze(0)
        rows = slice(part.offset, part.offset + len(part.rows))
        return local[self.experts.start : self.experts.stop, rows]


@dataclass(frozen=True)
class Round:
    """Matrices of one shape that are updated at the same time."""

    matrices: list[Matrices]
    owners: list[int]
    """Rank of the group that orthogonalizes each of `matrices`."""
    group: dist.ProcessGroup | None
    """The ranks that hold parts; None if this one holds them all."""
    axis: Axis
    """What their traffic counts for."""

    def trained(self) -> "Round":
        """Without the matrices that have no gradient: those of frozen parameters, on all ranks alike."""
        pairs = zip(self.matrices, self.owners, strict=True)
        kept = [(m, owner) for m, owner in pairs if m.parameter.grad is not None]
        return Round([m for m, _ in kept], [owner for _, owner in kept], self.group, self.axis)

    def jobs(self) -> list[Job]:
        """What `map_whole_matrices` asks for."""
        pairs = zip(self.matrices, self.owners, strict=True)
        return [Job(m.count, m.spread, owner) for m, owner in pairs]


def plan_rounds(
    parameters: Sequence[nn.Parameter],
    rows: Sequence[tuple[int, ...]],
    stage: dist.ProcessGroup | None,
) -> Iterator[Round]:
    """Give every matrix an owner, balanced by cost, and batch those of one shape.

    Every rank of a group makes the same plan.

    Args:
        parameters: `[rows, columns]` or `[experts, rows, columns]`.
        rows: of each parameter, the rows of the matrices stacked in it, see `train.model.roles`.
        stage: the ranks over which two-dimensional ones are spread; None if they are plain tensors.
    """
    members: dict[tuple[dist.ProcessGroup | None, Axis], list[Matrices]] = {}
    for parameter, stacked in zip(parameters, rows, strict=True):
        group, spread = holders(parameter, stage)
        alike = members.setdefault((group, "dp" if parameter.ndim == 2 else "edp"), [])
        alike.extend(_matrices_of(parameter, stacked, spread, _size(group)))
    for (group, axis), matrices in members.items():
        owners = balance([m.count * flops(*m.shape) for m in matrices], _size(group))
        for shape in dict.fromkeys(m.shape for m in matrices):
            queues: list[list[Matrices]] = [[] for _ in range(_size(group))]
            for m, owner in zip(matrices, owners, strict=True):
                if m.shape == shape:
                    queues[owner].append(m)
            for taken in itertools.zip_longest(*map(_batches, queues), fillvalue=[]):
                yield Round(
                    matrices=[m for batch in taken for m in batch],
                    owners=[owner for owner, batch in enumerate(taken) for _ in batch],
                    group=group,
                    axis=axis,
                )


def holders(
    parameter: nn.Parameter, stage: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup | None, Spread]:
    """The ranks that share a parameter's matrices, None if no other does, and how.

    Experts are whole on the ranks that have them, so only copies of them are shared.

    Args:
        parameter: `[rows, columns]`, or `[experts, rows, columns]` cut by expert.
        stage: all ranks of the mesh of a two-dimensional parameter, in the same order.
    """
    height, width = parameter.shape[-2:]

    def over(mesh: tuple[int, ...], cuts: tuple[int | None, ...]) -> Spread:
        return Spread(range(height), (height, width), mesh, cuts)

    if not isinstance(parameter, DTensor):
        return None, over((), ())
    mesh, cuts = parameter.device_mesh, cut_dims(parameter)
    if parameter.ndim == 2:
        assert stage is not None, "sharded matrices need the group of their ranks"
        assert mesh.mesh.flatten().tolist() == dist.get_process_group_ranks(stage), mesh
        return stage, over(tuple(mesh.shape), cuts)
    assert not any(cuts), f"{parameter.placements}: experts are cut by expert"
    copied = [axis for axis, dim in enumerate(cuts) if dim is None and mesh.size(axis) > 1]
    if not copied:
        return None, over((), ())
    [axis] = copied
    return mesh.get_group(axis), over((mesh.size(axis),), (None,))


def local_part(tensor: Tensor | None) -> Tensor:
    """This rank's part of a parameter, state or gradient."""
    assert tensor is not None, "no gradient"
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _matrices_of(
    parameter: nn.Parameter, rows: Sequence[int], spread: Spread, num_ranks: int
) -> Iterator[Matrices]:
    """The matrices stacked in a parameter, those of a share of the experts at a time."""
    assert sum(rows) == parameter.shape[-2], (rows, parameter.shape)
    experts = range(len(local_part(parameter)) if parameter.ndim == 3 else 1)
    start = 0
    for height in rows:
        matrix = replace(spread, rows=range(start, start + height))
        share = max(1, min(at_once(matrix), math.ceil(len(experts) / num_ranks)))
        for first in range(0, len(experts), share):
            yield Matrices(parameter, experts[first : first + share], matrix)
        start += height


def _batches(matrices: Sequence[Matrices]) -> list[list[Matrices]]:
    """Matrices of one shape in lists of as many as one rank orthogonalizes at a time."""
    batches: list[list[Matrices]] = []
    room = 0
    for m in matrices:
        if m.count > room:
            batches.append([])
            room = at_once(m.spread)
        batches[-1].append(m)
        room -= m.count
    return batches


def at_once(spread: Spread) -> int:
    """Matrices that a rank orthogonalizes at a time, while the results for other copies arrive."""
    return max(1, ROUND_ELEMENTS // (math.prod(spread.matrix_shape) * spread.copies))


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
