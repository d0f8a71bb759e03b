"""The routed experts of one layer and the dispatch of tokens to them on one rank.

`layer` holds both. Expert parallelism replaces the dispatch (`MoeLayer.dispatch`) and cuts the
experts along dim 0; neither file knows about ranks.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.rows import combine, order_by_expert, row_multiple, spread
from train.model.ffn import swiglu
from train.model.moe.config import MoeConfig


class Experts(nn.Module):
    """SwiGLU experts stacked on dim 0; the gate rows of `gate_up` come before the up rows."""

    def __init__(self, config: MoeConfig, hidden_size: int, limit: float | None) -> None:
        super().__init__()
        experts, width = config.num_experts, config.expert_intermediate_size
        self.limit = limit
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(
        self, rows: Float[Tensor, "rows hidden"], counts: Int[Tensor, "local_experts"]
    ) -> Float[Tensor, "rows hidden"]:
        """Apply each expert to its rows.

        Also on no rows the output stays connected to the input: with expert parallelism the graph
        must reach the exchange on every rank, or the others wait for it in backward.

        Args:
            rows: sorted by expert.
            counts: rows of each expert.
        """
        gate, up = grouped_linear(rows, self.gate_up, counts).chunk(2, dim=-1)
        return grouped_linear(swiglu(gate, up, self.limit), self.down, counts)


def grouped_linear(
    rows: Float[Tensor, "rows in_size"],
    weights: Float[Tensor, "experts out_size in_size"],
    counts: Int[Tensor, "experts"],
) -> Float[Tensor, "rows out_size"]:
    """`x @ weight_e^T` for the rows x of every expert e, one expert after the other in `rows`.

    A grouped matrix product where torch has one: not in fp64, not for rows that are no multiple of
    16 bytes, not for no rows at all. Else a loop.
    """
    aligned = all(size * rows.element_size() % 16 == 0 for size in weights.shape[1:])
    if len(rows) and aligned and rows.dtype != torch.float64:
        ends = counts.cumsum(0).to(torch.int32)
        out: Tensor = _GroupedLinear.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
        return out
    # unbind, not indexing: its backward stacks the gradients instead of padding each to full size.
    parts = zip(torch.split(rows, counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


class _GroupedLinear(torch.autograd.Function):
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


class LocalDispatcher:
    """Bring tokens to experts that are all on this rank, and the results back.

    Args:
        num_experts: experts of the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Callable[[], Tensor]:
        """What returns the weighted sum of each token's experts, in the type of `tokens`."""
        order = order_by_expert(expert_indices, self.num_experts, multiple=row_multiple(tokens))
        rows = spread(tokens, order)
        return lambda: combine(experts(rows, order.counts), order, expert_weights)
