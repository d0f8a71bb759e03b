"""Rows of tokens sorted by expert, and the weighted sum of the experts' results.

Every dispatcher uses these.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ExpertOrder:
    """Where rows stand when sorted by expert, and by token for one expert.

    A row belongs to a pair of a token and one of its experts; pairs are numbered by token.
    """

    token: Int[Tensor, "places"]
    """Token of each place; 0 for padding."""
    place: Int[Tensor, "pairs"]
    """Place of each pair."""
    start: Int[Tensor, "tokens"]
    """First pair of each token."""
    counts: Int[Tensor, "experts"]
    """Places of each expert, its padding included, which comes last."""


Permute = Callable[[Tensor, ExpertOrder], tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]]
"""(tokens [tokens hidden], order) -> rows [places hidden], and what brings results back:
(results [places hidden], weight of each pair) -> [tokens hidden]."""


def order_by_expert(
    expert_indices: Int[Tensor, "tokens k"], num_experts: int, *, multiple: int = 1
) -> ExpertOrder:
    """Sort rows by expert and pad the rows of each expert to a multiple.

    Args:
        expert_indices: experts of each token.
        num_experts: experts that have places, also without a token.
        multiple: see `row_multiple`.
    """
    chosen = expert_indices.flatten()
    # Stable, so that the order of sums does not depend on the sort.
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=num_experts)
    padding = -counts % multiple
    rows = torch.arange(len(chosen), device=chosen.device)
    place = torch.empty_like(order)
    place[order] = rows + (padding.cumsum(0) - padding)[chosen[order]]
    places = len(chosen) if multiple == 1 else len(chosen) + int(padding.sum())
    k = expert_indices.shape[1]
    token = torch.zeros(places, dtype=torch.int64, device=chosen.device)
    token[place] = rows // k
    return ExpertOrder(token, place, rows[::k], counts + padding)


def order_present_by_expert(
    expert_indices: Int[Tensor, "tokens k"], num_experts: int, *, multiple: int = 1
) -> ExpertOrder:
    """`order_by_expert` where tokens differ in their number of experts: negative ones are none."""
    present = expert_indices >= 0
    pairs = order_by_expert(expert_indices[present].unsqueeze(1), num_experts, multiple=multiple)
    of_token = present.sum(1)
    token = present.nonzero()[:, 0]
    return ExpertOrder(token[pairs.token], pairs.place, of_token.cumsum(0) - of_token, pairs.counts)


def row_multiple(rows: Float[Tensor, "rows hidden"]) -> int:
    """Multiple of rows that an expert should have for fast products.

    On a processor oneDNN compiles every bf16 product anew for a number of rows that it has not
    seen, which costs as much as 500 rows of width 256; with multiples of 32 it soon has seen all.
    """
    return 32 if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else 1


def permute(
    tokens: Float[Tensor, "tokens hidden"], order: ExpertOrder
) -> tuple[Float[Tensor, "places hidden"], Callable[[Tensor, Tensor], Tensor]]:
    """`spread` and `combine`: the reference kernel, see `parallel.backend.kernels`."""
    return spread(tokens, order), lambda results, weights: combine(results, order, weights)


def spread(
    tokens: Float[Tensor, "tokens hidden"], order: ExpertOrder
) -> Float[Tensor, "places hidden"]:
    """Copy each token to its places; gradients of a token's rows are summed in fp32 or wider.

    Padding repeats a token; its results must not be used, so that its gradient is 0.
    """
    rows: Tensor = _Spread.apply(tokens, order)  # type: ignore[no-untyped-call]
    return rows


def combine(
    results: Float[Tensor, "places hidden"],
    order: ExpertOrder,
    weights: Float[Tensor, "tokens k"] | Float[Tensor, "pairs"],
) -> Float[Tensor, "tokens hidden"]:
    """Weighted sum of each token's results, in fp32 or wider, one after the other over k.

    The result has the type of `results`. Gradients of padding are 0.
    """
    total: Tensor = _Combine.apply(results, weights.flatten(), order)  # type: ignore[no-untyped-call]
    return total


class _Spread(torch.autograd.Function):
    """The gradient gathers: adding rows to tokens would round a bf16 sum after every row."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: ExpertOrder) -> Tensor:
        ctx.order = order
        return tokens.index_select(0, order.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.order.place, grad, ctx.order.start, mode="sum"), None


class _Combine(torch.autograd.Function):
    """Keeps the results in their own type, not the weighted fp32 copy of them."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, weights: Tensor, order: ExpertOrder) -> Tensor:
        ctx.save_for_backward(results, weights)
        ctx.order = order
        wide = torch.promote_types(results.dtype, torch.float32)
        total = F.embedding_bag(
            order.place,
            results.to(wide),
            order.start,
            mode="sum",
            per_sample_weights=weights.to(wide),
        )
        return total.to(results.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        results, weights = ctx.saved_tensors
        place, token = ctx.order.place, ctx.order.token
        wide = torch.promote_types(results.dtype, torch.float32)
        rows = grad.to(wide).index_select(0, token)
        # Equal types first: products of mixed ones are several times as slow.
        products = (results.to(wide) * rows).sum(-1)
        grad_weights = products.index_select(0, place)
        weight_of_place = rows.new_zeros(len(token), 1)
        weight_of_place[place] = weights.to(wide).unsqueeze(1)
        return rows.mul_(weight_of_place).to(results.dtype), grad_weights.to(weights.dtype), None
