"""Products of rows with the weights of their experts; two kernels, see `parallel.backend.kernels`."""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [rows in], weights [experts out in], counts [experts]) -> [rows out]: `x @ weight_e^T` for
the rows x of every expert e, which stand one expert after the other."""


def grouped_mm(
    rows: Float[Tensor, "rows in_size"],
    weights: Float[Tensor, "experts out_size in_size"],
    counts: Int[Tensor, "experts"],
) -> Float[Tensor, "rows out_size"]:
    """One grouped matrix product where torch has one, else `loop`.

    It has none in fp64, for rows that are no multiple of 16 bytes, or for no rows at all.
    """
    aligned = all(size * rows.element_size() % 16 == 0 for size in weights.shape[1:])
    if len(rows) and aligned and rows.dtype != torch.float64:
        ends = counts.cumsum(0).to(torch.int32)
        out: Tensor = _GroupedProduct.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
        return out
    return loop(rows, weights, counts)


def loop(
    rows: Float[Tensor, "rows in_size"],
    weights: Float[Tensor, "experts out_size in_size"],
    counts: Int[Tensor, "experts"],
) -> Float[Tensor, "rows out_size"]:
    """The reference: a product for each expert, also for those without rows."""
    # unbind, not indexing: its backward stacks the gradients instead of padding each to full size.
    parts = zip(torch.split(rows, counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


class _GroupedProduct(torch.autograd.Function):
    """torch's own gradient refuses a gradient whose rows are not aligned, such as an expanded one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weights, offs=ends)
        grad_weights = F.grouped_mm(grad.transpose(0, 1), rows, offs=ends)
        return grad_rows, grad_weights, None
