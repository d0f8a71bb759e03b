"""Causal attention within documents, the innermost kernel; called by the attention files.

A reference that runs everywhere: chunked over queries, probabilities recomputed in backward unless
the sequence is short, so memory grows with the sequence times the chunk. On one CPU thread it is 2.5-3 times as fast as
`F.scaled_dot_product_attention` at 2048 tokens, which takes its unfused path when values are
narrower than keys, as in MLA.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.runs import Chunk, Runs, chunks
from train.model.attention.indexer import selection_mask

CHUNK_BYTES = 256
"""Queries that are computed together, times the bytes of a number: 128 in bf16, 64 in fp32, which
were fastest on a processor. Shorter chunks compute fewer hidden scores, longer ones are faster."""
KEEP_UP_TO = 512
"""Longest sequence that keeps its probabilities for the backward pass."""

_HIDDEN = -1e30
"""Added to the scores of hidden keys: exp() of the difference to any other score is exactly 0."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Sees each chunk of the forward pass: number of its first query; probabilities summed over heads,
fp32 or wider; and which keys are hidden: see `IndexerLoss.over_keys`."""


def attend(
    query: Float[Tensor, "batch heads queries qk_dim"],
    key: Float[Tensor, "batch heads seq qk_dim"],
    value: Float[Tensor, "batch heads seq v_dim"],
    document_ids: Int[Tensor, "batch seq"],
    scale: float,
    *,
    runs: Runs | None = None,
    selected: Int[Tensor, "batch queries k"] | None = None,
    observe: Observer | None = None,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """`softmax(scale * query key^T) value` over the earlier tokens of the same document and itself.

    Keys are the whole sequence in order: the query at place i sees key j if j <= i and both have the
    same document id. The softmax is computed in fp32 or wider.

    Args:
        query: any float type.
        key: one per token.
        value: may be narrower or wider than the keys.
        document_ids: document of each token; equal numbers are one document.
        scale: factor on the scores.
        runs: places of the queries in the sequence, in order; None: there is one for every token.
        selected: the only visible keys that a query attends to, -1 where it has fewer; None for
            all. The cost stays that of all keys: `dsa` gathers where few are selected.
        observe: is shown the probabilities.
    """
    runs = runs or (range(key.shape[2]),)
    result: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, document_ids, scale, runs, selected, observe
    )
    return result


class _Attention(torch.autograd.Function):
    """Forward keeps inputs and output; backward recomputes each chunk's probabilities, if many."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_ids: Tensor,
        scale: float,
        runs: Runs,
        selected: Tensor | None,
        observe: Observer | None,
    ) -> Tensor:
        # Batch and heads become one dim, for bmm.
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        kept = []
        for chunk in _chunks(q, runs):
            rows, end = chunk.rows, chunk.end
            hidden = _hidden(document_ids, selected, chunk)
            scores = _scores(q[:, rows], k[:, :end], hidden, scale)
            probabilities = scores.softmax(-1)
            out[:, rows] = probabilities @ v[:, :end]
            if k.shape[1] <= KEEP_UP_TO:
                kept.append(probabilities)
            if observe is not None:
                wide = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
                observe(rows.start, wide.view(*query.shape[:2], *hidden.shape[1:]).sum(1), hidden)
        ctx.save_for_backward(q, k, v, out, document_ids, selected, *kept)
        ctx.scale, ctx.runs = scale, runs
        return out.view(*query.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, document_ids, selected, *kept = ctx.saved_tensors
        scale, leading = ctx.scale, grad.shape[:2]
        grad = grad.reshape(out.shape)
        # d softmax: dS = P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O).
        row_sum = (grad * out).sum(-1, keepdim=True)
        # Few chunks are summed in bf16 as they come; of many the rounding would show.
        wide = q.dtype if kept else torch.promote_types(q.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        grad_q = torch.empty_like(q)
        for index, chunk in enumerate(_chunks(q, ctx.runs)):
            rows, end = chunk.rows, chunk.end
            if kept:
                probabilities = kept[index]
            else:
                hidden = _hidden(document_ids, selected, chunk)
                probabilities = _scores(q[:, rows], k[:, :end], hidden, scale).softmax(-1)
            _add_product(grad_v[:, :end], probabilities.transpose(1, 2), grad[:, rows])
            values = v[:, :end].transpose(1, 2)
            scores = torch.baddbmm(
                row_sum[:, rows], grad[:, rows], values, beta=-scale, alpha=scale
            )
            scores *= probabilities
            grad_q[:, rows] = scores @ k[:, :end]
            _add_product(grad_k[:, :end], scores.transpose(1, 2), q[:, rows])
        grads = (grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(x.view(*leading, *x.shape[1:]) for x in grads), *[None] * 5


def _chunks(q: Float[Tensor, "rows queries qk_dim"], runs: Runs) -> Iterator[Chunk]:
    """The queries that are computed together."""
    return chunks(runs, CHUNK_BYTES // q.element_size())


def _scores(
    q: Float[Tensor, "rows queries qk_dim"],
    k: Float[Tensor, "rows keys qk_dim"],
    hidden: Bool[Tensor, "batch queries keys"],
    scale: float,
) -> Float[Tensor, "rows queries keys"]:
    """Scores of a chunk's queries, far below all others where hidden.

    In the type of `q`; their softmax is computed in fp32 or wider inside and rounded once.
    """
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    # Several times as fast as filling by a mask that all heads share.
    offset = hidden.to(q.dtype).mul_(_HIDDEN)
    scores.view(len(hidden), -1, *scores.shape[1:]).add_(offset.unsqueeze(1))
    return scores


def _add_product(
    total: Float[Tensor, "rows keys dim"],
    a: Float[Tensor, "rows keys queries"],
    b: Float[Tensor, "rows queries dim"],
) -> None:
    """`total += a b`, in one operation where the types allow it."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


def _hidden(
    document_ids: Int[Tensor, "batch seq"],
    selected: Int[Tensor, "batch queries k"] | None,
    chunk: Chunk,
) -> Bool[Tensor, "batch chunk keys"]:
    """True where a query of the chunk does not attend to a key before its end."""
    start, end = chunk.start, chunk.end
    places = torch.arange(end, device=document_ids.device)
    later = places > places[start:, None]
    hidden = (document_ids[:, start:end, None] != document_ids[:, None, :end]) | later
    return hidden if selected is None else hidden | ~selection_mask(selected[:, chunk.rows], end)
