"""Attention of every query to a few keys of its own, gathered; called by `dsa`.

One key-value row serves all heads (multi-query attention), and its leading channels are the value.
Rows are gathered and probabilities recomputed in backward, some queries at a time: only inputs and
indices are kept.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.model.attention.indexer import gathered_rows

_ROWS = 2**16
"""Key-value rows that are gathered at a time."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Sees each chunk of the forward pass: number of its first query; probabilities of the selected keys
summed over heads, fp32 or wider; their indices: see `IndexerLoss.over_selected`."""


def attend_to_selected(
    query: Float[Tensor, "batch queries heads dim"],
    kv: Float[Tensor, "batch keys dim"],
    selected: Int[Tensor, "batch queries k"],
    v_dim: int,
    observe: Observer | None = None,
) -> Float[Tensor, "batch queries heads v_dim"]:
    """`softmax(query kv^T) kv[..., :v_dim]` over the selected rows; softmax in fp32 or wider.

    Args:
        query: scaled.
        kv: one row per key for all heads.
        selected: rows that each query attends to, at least one; -1 where it has fewer than k.
        v_dim: leading channels that are the value.
        observe: is shown the probabilities.
    """
    result: Tensor = _Gathered.apply(query, kv, selected, v_dim, observe)  # type: ignore[no-untyped-call]
    return result


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        query: Tensor,
        kv: Tensor,
        selected: Tensor,
        v_dim: int,
        observe: Observer | None,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], v_dim)
        for start, end in _chunks(selected):
            chosen = selected[:, start:end]
            p, rows, _ = _probabilities(query[:, start:end], kv, chosen)
            result = p.to(rows.dtype) @ rows[..., :v_dim]
            out[:, start:end] = result.view(*out.shape[:1], end - start, *out.shape[2:])
            if observe is not None:
                observe(start, p.sum(1).view(chosen.shape), chosen)
        ctx.save_for_backward(query, kv, selected)
        ctx.v_dim = v_dim
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, kv, selected = ctx.saved_tensors
        v_dim = ctx.v_dim
        grad_query = torch.empty_like(query)
        wide = torch.promote_types(kv.dtype, torch.float32)
        grad_kv = torch.zeros_like(kv, dtype=wide)
        for start, end in _chunks(selected):
            q = query[:, start:end]
            p, rows, places = _probabilities(q, kv, selected[:, start:end])
            p = p.to(rows.dtype)
            grad_out = grad[:, start:end].flatten(0, 1)
            # d softmax: dS = P * (dP - rowsum(P * dP)).
            grad_p = grad_out @ rows[..., :v_dim].transpose(1, 2)
            grad_s = (grad_p - (p * grad_p).sum(-1, keepdim=True)).mul_(p)
            grad_query[:, start:end] = (grad_s @ rows).view_as(q)
            grad_rows = grad_s.transpose(1, 2) @ q.flatten(0, 1)
            grad_rows[..., :v_dim] += p.transpose(1, 2) @ grad_out
            grad_kv.view(-1, kv.shape[-1]).index_add_(0, places, grad_rows.flatten(0, 1).to(wide))
        return grad_query, grad_kv.to(kv.dtype), None, None, None


def _chunks(selected: Int[Tensor, "batch queries k"]) -> list[tuple[int, int]]:
    """Pieces of the queries that gather about `_ROWS` rows each."""
    batch, queries, k = selected.shape
    size = max(1, _ROWS // (batch * k))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _probabilities(
    query: Float[Tensor, "batch queries heads dim"],
    kv: Float[Tensor, "batch keys dim"],
    selected: Int[Tensor, "batch queries k"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query: probabilities [rows heads k], gathered rows [rows k dim], and their places."""
    places = gathered_rows(selected, kv.shape[1])
    rows = kv.flatten(0, 1).index_select(0, places).view(-1, selected.shape[-1], kv.shape[-1])
    scores = query.flatten(0, 1) @ rows.transpose(1, 2)
    scores.masked_fill_((selected < 0).flatten(0, 1).unsqueeze(1), float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide), rows, places
