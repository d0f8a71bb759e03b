"""Causal attention within documents, the innermost kernel; called by the attention files.

A reference that runs everywhere: chunked over queries, probabilities recomputed in backward, so
memory grows with the sequence times the chunk. On one CPU thread it is 2.5-3 times as fast as
`F.scaled_dot_product_attention` at 2048 tokens, which takes its unfused path when values are
narrower than keys, as in MLA.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.model.attention.indexer import selection_mask

CHUNK = 128
"""Queries that are computed together."""

_HIDDEN = -1e30
"""Added to the scores of hidden keys: exp() of the difference to any other score is exactly 0."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Sees each chunk of the forward pass: place of its first query; probabilities summed over heads,
fp32 or wider; and which keys are hidden: see `IndexerLoss.over_keys`."""


def attend(
    query: Float[Tensor, "batch heads seq qk_dim"],
    key: Float[Tensor, "batch heads seq qk_dim"],
    value: Float[Tensor, "batch heads seq v_dim"],
    document_ids: Int[Tensor, "batch seq"],
    scale: float,
    *,
    selected: Int[Tensor, "batch seq k"] | None = None,
    observe: Observer | None = None,
) -> Float[Tensor, "batch heads seq v_dim"]:
    """`softmax(scale * query key^T) value` over the earlier tokens of the same document and itself.

    Keys are the whole sequence in order: query i sees key j if j <= i and both have the same
    document id. The softmax is computed in fp32 or wider.

    Args:
        query: any float type.
        key: one per query.
        value: may be narrower or wider than the keys.
        document_ids: document of each token; equal numbers are one document.
        scale: factor on the scores.
        selected: the only visible keys that a query attends to, -1 where it has fewer; None for
            all. The cost stays that of all keys: `dsa` gathers where few are selected.
        observe: is shown the probabilities.
    """
    result: Tensor = _Attention.apply(query, key, value, document_ids, scale, selected, observe)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    """Forward keeps inputs and output; backward recomputes each chunk's probabilities."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_ids: Tensor,
        scale: float,
        selected: Tensor | None,
        observe: Observer | None,
    ) -> Tensor:
        # Batch and heads become one dim, for bmm.
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for start in range(0, q.shape[1], CHUNK):
            end = min(start + CHUNK, q.shape[1])
            hidden = _hidden(document_ids, selected, start, end)
            scores = _scores(q, k, hidden, scale, start, end)
            out[:, start:end] = scores.softmax(-1) @ v[:, :end]
            if observe is not None:
                wide = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
                observe(start, wide.view(*query.shape[:2], *hidden.shape[1:]).sum(1), hidden)
        ctx.save_for_backward(q, k, v, out, document_ids, selected)
        ctx.scale = scale
        return out.view(*query.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, document_ids, selected = ctx.saved_tensors
        scale, leading = ctx.scale, grad.shape[:2]
        grad = grad.reshape(out.shape)
        # d softmax: dS = P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O).
        row_sum = (grad * out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, q.shape[1], CHUNK):
            end = min(start + CHUNK, q.shape[1])
            rows = slice(start, end)
            hidden = _hidden(document_ids, selected, start, end)
            probabilities = _scores(q, k, hidden, scale, start, end).softmax(-1)
            grad_v[:, :end].baddbmm_(probabilities.transpose(1, 2), grad[:, rows])
            scores = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2))
            scores = scores.sub_(row_sum[:, rows]).mul_(probabilities)
            grad_q[:, rows] = scores @ k[:, :end]
            grad_k[:, :end].baddbmm_(scores.transpose(1, 2), q[:, rows])
        grads = (grad_q.mul_(scale), grad_k.mul_(scale), grad_v)
        return *(x.view(*leading, *x.shape[1:]) for x in grads), *[None] * 4


def _scores(
    q: Float[Tensor, "rows seq qk_dim"],
    k: Float[Tensor, "rows seq qk_dim"],
    hidden: Bool[Tensor, "batch queries keys"],
    scale: float,
    start: int,
    end: int,
) -> Float[Tensor, "rows queries keys"]:
    """Scores of queries [start, end) over keys [0, end), far below all others where hidden.

    In the type of `q`; their softmax is computed in fp32 or wider inside and rounded once.
    """
    keys = k[:, :end].transpose(1, 2)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q[:, start:end], keys, beta=0, alpha=scale)
    # Several times as fast as filling by a mask that all heads share.
    offset = hidden.to(q.dtype).mul_(_HIDDEN)
    scores.view(len(hidden), -1, *scores.shape[1:]).add_(offset.unsqueeze(1))
    return scores


def _hidden(
    document_ids: Int[Tensor, "batch seq"],
    selected: Int[Tensor, "batch seq k"] | None,
    start: int,
    end: int,
) -> Bool[Tensor, "batch queries keys"]:
    """True where a query of [start, end) does not attend to a key of [0, end)."""
    places = torch.arange(end, device=document_ids.device)
    later = places > places[start:, None]
    hidden = (document_ids[:, start:end, None] != document_ids[:, None, :end]) | later
    return hidden if selected is None else hidden | ~selection_mask(selected[:, start:end], end)
