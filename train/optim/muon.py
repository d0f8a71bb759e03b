"""Muon: momentum whose singular values are set to 1, for weight matrices; built by `build`.

Every matrix must be whole for that. Experts are whole already: they are sharded by expert, so each
rank updates its own, with no communication. Other matrices are sharded by rows over the FSDP group;
each has an owner there, balanced by cost, to which its rows travel and from which they return.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.owners import map_whole_matrices
from train.optim.newton_schulz import orthogonalize
from train.optim.rounds import (
    ROUND_ELEMENTS,
    Matrix,
    Round,
    local_part,
    matrices_of,
    plan_rounds,
)

Place = slice | tuple[slice, slice]


class Muon(torch.optim.Optimizer):
    """`M <- mu M + G;  W <- (1 - lr wd) W - lr rms sqrt(max(n, m)) NS(G + mu M)` for each n x m matrix.

    Nesterov momentum and the hybrid Newton-Schulz iteration of DeepSeek-V4 (arXiv 2606.19348,
    section 2.4). The root of the mean square of an update of full rank is lr x rms, about that of
    AdamW, so that both share a learning rate and a weight decay.

    Communication: `step` brings each sharded matrix to its owner and back, in the type of the
    iteration: see `map_whole_matrices`. In bf16 that is about 4 bytes per parameter of a rank's
    shard sent and 4 received, whatever the number of ranks. Experts: none.

    Args:
        parameters: `[rows, columns]`, plain or a DTensor sharded on dim 0 over a one-dimensional
            mesh; or `[experts, rows, columns]`, plain or sharded on dim 0 over any mesh.
        rows: of each parameter, the rows of the matrices stacked in it, see `train.model.roles`.
        lr: learning rate; `set_learning_rate` changes it.
        weight_decay: wd, decoupled.
        momentum: mu.
        update_rms: rms.
        dtype: type of the iteration; bf16 is enough for training.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        rows: Sequence[tuple[int, ...]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        update_rms: float,
        dtype: torch.dtype,
    ) -> None:
        group = {"params": list(parameters), "learning_rate_multiplier": 1.0}
        super().__init__([group], {"lr": lr, "weight_decay": weight_decay})
        self._momentum, self._update_rms, self._dtype = momentum, update_rms, dtype
        dense: list[Matrix] = []
        self._experts: list[Matrix] = []
        for parameter, stacked in zip(parameters, rows, strict=True):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            (dense if parameter.ndim == 2 else self._experts).extend(
                matrices_of(parameter, stacked)
            )
        self._rounds = list(plan_rounds(dense))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Update every parameter that has a gradient; gradients are summed over ranks already."""
        assert closure is None, "the gradients are there already"
        [group] = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                momentum = local_part(self.state[parameter]["momentum_buffer"])
                momentum.mul_(self._momentum).add_(local_part(parameter.grad))
        for matrix in self._experts:
            if matrix.parameter.grad is not None:
                self._update_experts(matrix)
        for planned in self._rounds:
            work = planned.trained()
            if work.matrices:
                self._update_round(work)

    def _update_experts(self, matrix: Matrix) -> None:
        """Update this matrix of all experts on this rank."""
        experts = len(local_part(matrix.parameter))
        at_once = max(1, ROUND_ELEMENTS // (matrix.shape[0] * matrix.shape[1]))
        for first in range(0, experts, at_once):
            place = (slice(first, first + at_once), slice(matrix.start, matrix.stop))
            self._apply(matrix, place, orthogonalize(self._direction(matrix, place)))

    def _update_round(self, work: Round) -> None:
        rank = 0 if work.group is None else work.group.rank()
        places = [shards[rank] for shards in work.shards]
        directions = [self._direction(m, p) for m, p in zip(work.matrices, places, strict=True)]
        if work.group is None:
            updates = list(orthogonalize(torch.stack(directions)))
        else:
            counts = [[s.stop - s.start for s in shards] for shards in work.shards]
            updates = map_whole_matrices(orthogonalize, directions, counts, work.owners, work.group)
        for matrix, place, update in zip(work.matrices, places, updates, strict=True):
            self._apply(matrix, place, update)

    def _direction(self, matrix: Matrix, place: Place) -> Tensor:
        """`G + mu M` at a place of the local part, in the type of the iteration."""
        momentum = local_part(self.state[matrix.parameter]["momentum_buffer"])[place]
        gradient = local_part(matrix.parameter.grad)[place]
        return gradient.add(momentum, alpha=self._momentum).to(self._dtype)

    def _apply(self, matrix: Matrix, place: Place, update: Tensor) -> None:
        """Decay and move the weights at a place of the local part."""
        [group] = self.param_groups
        scale = group["lr"] * self._update_rms * max(matrix.shape) ** 0.5
        weight = local_part(matrix.parameter)[place]
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-scale)
