"""Orthogonalization by Newton-Schulz iterations: the heart of `muon`, plain functions of tensors."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = tuple[float, float, float]

HYBRID: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""DeepSeek-V4 (arXiv 2606.19348, section 2.4): eight steps that lift small singular values fast and
end anywhere near 1, then two that converge to 1."""


def orthogonalize(
    matrices: Float[Tensor, "count rows columns"], coefficients: Sequence[Coefficients] = HYBRID
) -> Float[Tensor, "count rows columns"]:
    """The nearest matrices with all singular values 1: U V^T of each U S V^T.

    X <- a X + (b A + c A^2) X  with A = X X^T, from X = G / |G|_F, in the type of the input. Singular
    values are mapped by the odd polynomial `a s + b s^3 + c s^5` and singular vectors stay. With
    `HYBRID` those from 2e-3 |G|_F on end in [0.99, 1.01]; smaller ones end below, and 0 stays 0.

    Args:
        matrices: of one shape; computed on the shorter side.
        coefficients: (a, b, c) of each iteration.
    """
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    x = (x / norm.clamp(min=torch.finfo(wide).tiny)).to(x.dtype)
    if wide == x.dtype:
        # Batched products gain in bf16 only: in fp32 a loop is faster.
        x = torch.cat([_iterate(one, coefficients) for one in x.split(1)]) if len(x) else x
    else:
        x = _iterate(x, coefficients)
    return x.mT if rows > columns else x


def flops(rows: int, columns: int) -> int:
    """Floating-point operations of `orthogonalize` on one matrix."""
    short, long = min(rows, columns), max(rows, columns)
    return len(HYBRID) * 2 * short * short * (2 * long + short)


def _iterate(
    x: Float[Tensor, "count short long"], coefficients: Sequence[Coefficients]
) -> Float[Tensor, "count short long"]:
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
