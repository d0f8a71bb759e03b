"""Who orthogonalizes which matrix, and when: the plan that `muon` makes once and follows each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.owners import balance, shard_rows
from train.optim.newton_schulz import flops

ROUND_ELEMENTS = 1 << 26
"""Elements that one rank orthogonalizes at a time (at least one matrix): bounds the extra memory."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """Rows `start` to `stop` of a parameter, or of each of its experts: one weight matrix."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        return self.stop - self.start, self.parameter.shape[-1]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks over which the parameter is sharded by rows; None for a plain tensor."""
        if not isinstance(self.parameter, DTensor):
            return None
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        assert mesh.ndim == 1, f"{placements}: rows are sharded over one mesh axis only"
        assert placements[0].is_shard(0), placements
        return mesh.get_group()

    def shards(self, num_ranks: int) -> list[slice]:
        """Rows of the matrix on each rank, counted from the first row that the rank holds."""
        held = shard_rows(self.parameter.shape[0], num_ranks)
        ends = [(max(self.start, r.start), min(self.stop, r.stop), r.start) for r in held]
        return [slice(a - base, max(a, b) - base) for a, b, base in ends]


@dataclass(frozen=True)
class Round:
    """Matrices of one shape that are updated together."""

    matrices: list[Matrix]
    shards: list[list[slice]]
    """For each matrix, its rows in each rank's part of the parameter."""
    owners: list[int]
    """Rank of the group that orthogonalizes each matrix."""
    group: dist.ProcessGroup | None

    def trained(self) -> "Round":
        """Without the matrices that have no gradient: those of frozen parameters, on all ranks alike."""
        kept = [i for i, matrix in enumerate(self.matrices) if matrix.parameter.grad is not None]
        return Round(
            [self.matrices[i] for i in kept],
            [self.shards[i] for i in kept],
            [self.owners[i] for i in kept],
            self.group,
        )


def matrices_of(parameter: nn.Parameter, rows: Sequence[int]) -> Iterator[Matrix]:
    """The matrices stacked in a parameter, see `train.model.roles.Role.rows`."""
    assert sum(rows) == parameter.shape[-2], (rows, parameter.shape)
    start = 0
    for count in rows:
        yield Matrix(parameter, start, start + count)
        start += count


def plan_rounds(matrices: Sequence[Matrix]) -> Iterator[Round]:
    """Give every matrix an owner, balanced by cost, and batch those of one shape.

    Every rank makes the same plan.

    Args:
        matrices: of two-dimensional parameters.
    """
    for group in dict.fromkeys(matrix.group for matrix in matrices):
        size = 1 if group is None else group.size()
        members = [matrix for matrix in matrices if matrix.group is group]
        owners = balance([flops(*matrix.shape) for matrix in members], size)
        for shape in dict.fromkeys(matrix.shape for matrix in members):
            alike = [(m, o) for m, o in zip(members, owners, strict=True) if m.shape == shape]
            queues = [[m for m, o in alike if o == rank] for rank in range(size)]
            at_once = max(1, ROUND_ELEMENTS // (shape[0] * shape[1]))
            for first in range(0, max(map(len, queues)), at_once):
                taken = [(m, o) for o, q in enumerate(queues) for m in q[first : first + at_once]]
                yield Round(
                    matrices=[matrix for matrix, _ in taken],
                    shards=[matrix.shards(size) for matrix, _ in taken],
                    owners=[owner for _, owner in taken],
                    group=group,
                )


def local_part(tensor: Tensor | None) -> Tensor:
    """This rank's part of a parameter, state or gradient."""
    assert tensor is not None, "no gradient"
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
