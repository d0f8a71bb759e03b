"""Projection onto the doubly stochastic matrices; called by `stream_passes` for mHC."""

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
    (dim 0 is the row index, dim 1 the column) therefore sum to 1 up to rounding, 1e-6 in fp32,
    which bounds the forward gain. The columns, which bound the backward gain, keep a residual error.
    If the logits of no column spread by more than R, it is after t passes at most

        exp(R tanh(R/2)^(2t-1)) - 1        and never more than n - 1

    by Birkhoff's contraction of Hilbert's metric: 5e-5 at R = 2 and 0.06 at R = 3 for t = 20. Typical
    errors are far smaller at large R: at most 0.003 over 160,000 random 4x4 logits of standard
    deviation 1, 0.06 at 3 and 0.14 at 6.

    Args:
        logits: one matrix per token, tokens last so that every pass runs over long rows; fp32 or
            wider.
        num_iterations: column + row passes, at least 1.

    Returns:
        Non-negative matrices of the type of `logits`.
    """
    result: Tensor = _Sinkhorn.apply(logits, num_iterations)  # type: ignore[no-untyped-call]
    return result


def project_forward(logits: Tensor, num_iterations: int) -> Tensor:
    """`project_doubly_stochastic` without gradients."""
    matrix = _start(logits)
    for dim in (0, 1) * num_iterations:
        matrix.div_(matrix.sum(dim, keepdim=True))
    return matrix


def project_backward(logits: Tensor, grad: Tensor, num_iterations: int) -> Tensor:
    """Gradient of the logits. The passes are computed again: only the logits need to be kept."""
    start, sums = _start(logits), []
    matrix = start.clone()
    for dim in (0, 1) * num_iterations:
        sums.append(matrix.sum(dim, keepdim=True))
        matrix.div_(sums[-1])
    # Stage y = x / sum(x): dx = (dy - sum(dy * y)) / sum(x), and x = y * sum(x).
    grad = grad.clone()
    for stage in reversed(range(len(sums))):
        grad.sub_((grad * matrix).sum(stage % 2, keepdim=True)).div_(sums[stage])
        matrix.mul_(sums[stage])
    return grad.mul_(start)


def _start(logits: Tensor) -> Tensor:
    """`exp(logits)`; the first pass makes the result invariant to a shift of each column."""
    return (logits - logits.amax(0, keepdim=True)).clamp_(min=FLOOR).exp_()


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.num_iterations = num_iterations
        return project_forward(logits, num_iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return project_backward(logits, grad, ctx.num_iterations), None
