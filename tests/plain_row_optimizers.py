"""The row optimizers in plain torch: the formulas of `parallel.engram_optimizers`, operation by operation.

Every operation is one of torch on whole tensors, in the order in which the compiled loops round, so that
both give the same bits (but for roots); sums over columns and owners run in the same order, too. Rows are fp32 or fp64.
"""

from math import log2

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum

Arrays = dict[str, Tensor]
"""`rows` and the states, by the names of `RowStore.arrays`."""


def update(
    optimizer: RowOptimizer,
    arrays: Arrays,
    local: Int[Tensor, "touched"],
    gradients: Float[Tensor, "touched width"],
    *,
    learning_rate: float,
    scale: float,
) -> None:
    """Change the touched rows of a table with one owner."""
    match optimizer:
        case LazyAdam():
            _adam(optimizer, arrays, local, gradients * scale, learning_rate)
        case RowAdagrad():
            _adagrad(optimizer, arrays, local, gradients, learning_rate, scale)
        case SinkhornMomentum():
            _sinkhorn(optimizer, arrays, local, gradients * scale, learning_rate)
        case _:
            raise NotImplementedError(optimizer)


def _adam(
    optimizer: LazyAdam,
    arrays: Arrays,
    local: Int[Tensor, "touched"],
    gradients: Float[Tensor, "touched width"],
    learning_rate: float,
) -> None:
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    counts = arrays["num_updates"][local] + 1
    mean = arrays["exp_avg"][local]
    mean = mean + (1 - beta1) * (gradients - mean)
    square = beta2 * arrays["exp_avg_sq"][local] + (1 - beta2) * (gradients * gradients)
    correction1 = [1 / (1 - beta1**count) for count in counts.tolist()]
    correction2 = [(1 - beta2**count) ** -0.5 for count in counts.tolist()]
    rate = torch.tensor(correction1, dtype=torch.float64).mul(learning_rate).to(mean.dtype)[:, None]
    root = torch.tensor(correction2, dtype=torch.float64).to(mean.dtype)[:, None]
    arrays["rows"][local] -= rate * (mean / (_root(square) * root + optimizer.eps))
    arrays["exp_avg"][local], arrays["exp_avg_sq"][local] = mean, square
    arrays["num_updates"][local] = counts


def _adagrad(
    optimizer: RowAdagrad,
    arrays: Arrays,
    local: Int[Tensor, "touched"],
    gradients: Float[Tensor, "touched width"],
    learning_rate: float,
    scale: float,
) -> None:
    width = gradients.shape[1]
    sums = arrays["sum_of_squares"]
    sums[local] += scale**2 * _by_eight(gradients * gradients) / width
    # A number / a tensor is a product with the reciprocal.
    rate = sums.new_tensor(learning_rate * scale)
    factor = rate / (_root(sums[local]) + optimizer.eps)
    arrays["rows"][local] -= factor[:, None] * gradients


def _sinkhorn(
    optimizer: SinkhornMomentum,
    arrays: Arrays,
    local: Int[Tensor, "touched"],
    gradients: Float[Tensor, "touched width"],
    learning_rate: float,
) -> None:
    beta, width = optimizer.momentum, gradients.shape[1]
    momentum = beta * arrays["momentum_buffer"][local] + (1 - beta) * gradients
    arrays["momentum_buffer"][local] = momentum
    direction = beta * momentum + (1 - beta) * gradients
    norms = _root(_over_columns(direction.double() * direction.double()))
    mean = float(norms.mean()) if len(local) else 0.0
    if mean == 0:
        return
    unit = torch.where(norms > 1e-3 * mean, 2.0 ** -round(log2(mean)), 0.0)
    direction = direction * unit.to(direction.dtype)[:, None]
    squares = direction * direction
    columns = torch.ones(width, dtype=torch.float64)
    bits = 62 - len(local).bit_length()
    for _ in range(5):
        inverse = _inverse(_over_columns(squares * columns.to(squares.dtype)))
        shares = squares * columns.to(squares.dtype) * inverse[:, None]
        sums = (shares.double() * 2.0**bits).long().sum(0)
        columns = torch.where(sums > 0, columns * 2.0**bits / sums, 0.0)
    inverse = _inverse(_over_columns(squares * columns.to(squares.dtype)))
    rate = torch.tensor(optimizer.update_rms * learning_rate * width**0.5, dtype=direction.dtype)
    balanced = direction * _root(columns.to(direction.dtype))
    arrays["rows"][local] -= (rate * _root(inverse))[:, None] * balanced


def _over_columns(matrix: Float[Tensor, "touched width"]) -> Float[Tensor, "touched"]:
    """From the first to the last."""
    total = torch.zeros_like(matrix[:, 0])
    for column in matrix.unbind(1):
        total = total + column
    return total


def _by_eight(matrix: Float[Tensor, "touched width"]) -> Float[Tensor, "touched"]:
    """Eight sums, of every eighth column each, the rest in the first; then their halves, thrice."""
    whole = matrix.shape[1] // 8 * 8
    sums = torch.zeros_like(matrix[:, :1]).repeat(1, 8)
    for first in range(0, whole, 8):
        sums = sums + matrix[:, first : first + 8]
    for column in matrix[:, whole:].unbind(1):
        sums[:, 0] = sums[:, 0] + column
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, dim=1)
        sums = left + right
    return sums[:, 0]


def _inverse(sums: Float[Tensor, "touched"]) -> Float[Tensor, "touched"]:
    return torch.where(sums > 0, 1 / sums, 0.0)


def _root(numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Correctly rounded as IEEE 754 has it; torch's is that of MKL, and differs in the last bit."""
    return torch.from_numpy(np.sqrt(numbers.numpy()))
