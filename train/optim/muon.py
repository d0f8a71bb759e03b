"""Muon: momentum whose singular values are set to 1, for weight matrices; built by `build`.

Every matrix must be whole for that. Where ranks hold parts of it, one of them is its owner, to which
the parts travel and from which the results return; owners are balanced by cost. Experts are whole on
the ranks that have them; where several ranks keep the same ones, each updates a share for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.owners import map_whole_matrices
from train.optim.newton_schulz import orthogonalize
from train.optim.rounds import Matrices, Round, local_part, plan_rounds


class Muon(torch.optim.Optimizer):
    """`M <- mu M + G;  W <- (1 - lr wd) W - lr rms sqrt(max(n, m)) NS(G + mu M)` for each n x m matrix.

    Nesterov momentum and the hybrid Newton-Schulz iteration of DeepSeek-V4 (arXiv 2606.19348,
    section 2.4). The root of the mean square of an update of full rank is lr x rms, about that of
    AdamW, so that both share a learning rate and a weight decay.

    Communication: `step` brings each matrix that is cut to its owner and back, in the type of the
    iteration: see `map_whole_matrices`. In bf16 that is about 4 bytes per parameter of a rank's
    shard sent and 4 received, whatever the number of ranks. Experts: none. Results for copies (HSDP,
    whole experts) come from one owner: 2 bytes per parameter of a shard between the copies.

    Args:
        parameters: `[rows, columns]`, plain or a DTensor cut by rows, columns or both over the ranks
            of `stage`; or `[experts, rows, columns]`, plain or cut by expert over any mesh.
        rows: of each parameter, the rows of the matrices stacked in it, see `train.model.roles`.
        stage: the ranks that hold the model, or a pipeline's stage of it; None without DTensors.
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
        stage: dist.ProcessGroup | None = None,
    ) -> None:
        group = {"params": list(parameters), "learning_rate_multiplier": 1.0}
        super().__init__([group], {"lr": lr, "weight_decay": weight_decay})
        self._momentum, self._update_rms, self._dtype = momentum, update_rms, dtype
        for parameter in parameters:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._rounds = list(plan_rounds(parameters, rows, stage))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Update every parameter that has a gradient; gradients are summed over ranks already."""
        assert closure is None, "the gradients are there already"
        [group] = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                momentum = local_part(self.state[parameter]["momentum_buffer"])
                momentum.mul_(self._momentum).add_(local_part(parameter.grad))
        for planned in self._rounds:
            work = planned.trained()
            if work.matrices:
                self._update(work)

    def _update(self, work: Round) -> None:
        rank = 0 if work.group is None else work.group.rank()
        directions = [self._direction(matrices, rank) for matrices in work.matrices]
        if work.group is None:
            counts = [matrices.count for matrices in work.matrices]
            updates = list(torch.split(orthogonalize(torch.cat(directions)), counts))
        else:
            updates = map_whole_matrices(
                orthogonalize, directions, work.jobs(), work.group, axis=work.axis
            )
        for matrices, update in zip(work.matrices, updates, strict=True):
            self._apply(matrices, rank, update)

    def _direction(self, matrices: Matrices, rank: int) -> Tensor:
        """What this rank holds of `G + mu M`, in the type of the iteration."""
        momentum = matrices.within(self.state[matrices.parameter]["momentum_buffer"], rank)
        gradient = matrices.within(matrices.parameter.grad, rank)
        return gradient.add(momentum, alpha=self._momentum).to(self._dtype)

    def _apply(self, matrices: Matrices, rank: int, update: Tensor) -> None:
        """Decay and move what this rank holds of the weights."""
        [group] = self.param_groups
        scale = group["lr"] * self._update_rms * max(matrices.shape) ** 0.5
        weight = matrices.within(matrices.parameter, rank)
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-scale)
