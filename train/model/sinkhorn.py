"""Projection onto the doubly stochastic matrices; called by `residual` for mHC."""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

FLOOR = -80.0
"""Lowest logit below its column's largest: exp(-80) is next to nothing in fp32, but not 0,
and so no row sums to 0."""


def project_doubly_stochastic(
    logits: Float[Tensor, "streams streams tokens"], num_iterations: int
) -> Float[Tensor, "streams streams tokens"]:
    """Project exp(logits) onto the doubly stochastic matrices (Sinkhorn-Knopp).

    Eq. 9 of mHC (arXiv 2512.24880): M <- T_row(T_column(M)), column normalisation first. Rows
    (dim 0 is the row index, dim 1 the column) therefore sum to 1 up to rounding, which bounds the
    forward gain; the columns, which bound the backward gain, keep the residual error: at most 0.003
    after 20 passes over 160,000 random 4x4 logits of standard deviation 1, 0.06 at 3 and 0.14 at 6.

    Args:
        logits: one matrix per token, tokens last so that every pass runs over long rows; fp32 or
            wider.
        num_iterations: column + row passes, at least 1.

    Returns:
        Non-negative matrices of the type of `logits`.
    """
    result: Tensor = _Sinkhorn.apply(logits, num_iterations)  # type: ignore[no-untyped-call]
    return result


class _Sinkhorn(torch.autograd.Function):
    """In-place passes; only the sums are kept, from which backward rebuilds every stage."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_iterations: int) -> Tensor:
        # The first pass makes the result invariant to a shift of each column.
        start = (logits - logits.amax(0, keepdim=True)).clamp_(min=FLOOR).exp_()
        matrix, sums = start.clone(), []
        for dim in (0, 1) * num_iterations:
            sums.append(matrix.sum(dim, keepdim=True))
            matrix.div_(sums[-1])
        ctx.save_for_backward(start, matrix, *sums)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        start, matrix, *sums = ctx.saved_tensors
        # The gradient comes with tokens first in memory.
        grad, matrix = grad.clone(memory_format=torch.contiguous_format), matrix.clone()
        # Stage y = x / sum(x): dx = (dy - sum(dy * y)) / sum(x), and x = y * sum(x).
        for stage in reversed(range(len(sums))):
            grad.sub_((grad * matrix).sum(stage % 2, keepdim=True)).div_(sums[stage])
            matrix.mul_(sums[stage])
        return grad.mul_(start), None
