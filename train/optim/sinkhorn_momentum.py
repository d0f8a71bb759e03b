"""Sinkhorn-balanced momentum of DeepSeek-V4.1 for tables (Engram, embedding, head); built by `build`.

Its state is one number per parameter, half of AdamW's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from parallel.collectives import sum_over
from train.optim.rounds import holders, local_part

NORMALIZATIONS = 11
"""K of algorithm 1: rows and columns in turn, rows first and last."""
_THRESHOLD = 1e-3
"""tau of algorithm 1."""


class SinkhornMomentum(torch.optim.Optimizer):
    """`M <- beta M + (1-beta) G;  W <- W - gamma lr sqrt(n) U,  U = balance(beta M + (1-beta) G)`.

    Algorithm 1 of the DeepSeek-V4.1 report, in its dense form: every row is visited in every step. n
    is the width of a row, so that the root of the mean square of a row's update is gamma x lr. No
    weight decay.

    Communication: see `balance_`; a few all-reduces of one row per table and step.

    Args:
        groups: `params` and `learning_rate_multiplier`. Parameters are `[rows, n]`, plain or DTensors
            cut by rows over the ranks of `stage`, in one copy or several.
        lr: learning rate; `set_learning_rate` changes it.
        momentum: beta.
        update_rms: gamma.
        stage: the ranks that hold the model, or a pipeline's stage of it; None without DTensors.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, object]],
        *,
        lr: float,
        momentum: float,
        update_rms: float,
        stage: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__([dict(group) for group in groups], {"lr": lr})
        self._momentum, self._update_rms, self._stage = momentum, update_rms, stage
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Update every parameter that has a gradient; gradients are summed over ranks already."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: nn.Parameter, lr: float) -> None:
        gradient = local_part(parameter.grad)
        momentum = local_part(self.state[parameter]["momentum_buffer"])
        momentum.lerp_(gradient, 1.0 - self._momentum)
        direction = gradient.lerp(momentum, self._momentum)
        rows, width = parameter.shape
        group, spread = holders(parameter, self._stage)
        assert 1 not in spread.cuts, f"{spread}: a table is cut by rows"
        balance_(direction, rows, group, copies=spread.copies)
        local_part(parameter).add_(direction, alpha=-self._update_rms * lr * width**0.5)


def balance_(
    matrix: Float[Tensor, "local_rows width"],
    num_rows: int,
    group: dist.ProcessGroup | None = None,
    *,
    copies: int = 1,
) -> None:
    """Give all rows norm 1 and all columns nearly the same norm, in place: `diag(r) matrix diag(c)`.

    Rows whose norm is at most tau times the mean row norm become 0. Then K times in turn each row
    and each column is divided by its L2 norm. That is Sinkhorn's iteration on the squares, so only
    the scales r and c change from one pass to the next, and the matrix is written once.

    Communication: over `group`, one all-reduce of one number and (K - 1) / 2 of `width` numbers.

    Args:
        matrix: this rank's rows.
        num_rows: rows of the whole matrix.
        group: the ranks that share the rows; None if they are all here.
        copies: how often the group holds each row. The sums go over all copies and not within one,
            so that their rounding, too, is the same everywhere.
    """
    norms = torch.linalg.vector_norm(matrix, dim=1)
    mean = _sum(norms.sum(), group) / (num_rows * copies)
    # Squares of tiny gradients would underflow; only ratios matter.
    matrix.mul_(torch.where(norms > _THRESHOLD * mean, 1.0 / mean, 0.0).unsqueeze(1))
    squares = matrix.square()
    row = _inverse(squares.sum(1))
    column = squares.new_ones(squares.shape[1])
    for _ in range(NORMALIZATIONS // 2):
        column = _inverse(_sum(row @ squares, group))
        row = _inverse(squares @ column)
    matrix.mul_(row.sqrt().unsqueeze(1)).mul_(column.sqrt())


def _sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return value if group is None else sum_over(value, group, "dp")


def _inverse(sums: Float[Tensor, "lines"]) -> Float[Tensor, "lines"]:
    """1 / sum, and 0 for an empty row or column."""
    return torch.where(sums > 0, 1.0 / sums, 0.0)
