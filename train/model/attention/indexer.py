"""The lightning indexer's kernels: what it scores, selects, and learns from; called by `dsa`.

DeepSeek-V3.2-Exp, section 1. The indexer gives every query a score for each key that it may see,

    I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])                                      (eq. 1)

attention reads the k keys of the largest scores, and the indexer learns to imitate the attention's
distribution over the keys (eq. 3, 4). Keys are tokens (V3.2) or compressed entries (V4): only
`Visibility` tells them apart. Everything is computed for some queries at a time, in fp32 or wider,
and only indices are kept, so memory grows with the sequence times the chunk.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.runs import Runs, chunks

CHUNK = 128
"""Queries that are scored together, at most."""
_PIECE_NUMBERS = 2**22
"""Scores per head that exist at a time; a sequence too long for that gets fewer queries a chunk."""
_FEWEST_QUERIES = 4


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see: those of its document, from place `first_query` on."""

    query_documents: Int[Tensor, "batch seq"]
    """Document of each place in the sequence, where a query may stand."""
    key_documents: Int[Tensor, "batch keys"]
    """Document of each key; -1 for a key that is padding."""
    first_query: Int[Tensor, "batch keys"]
    """Place in the sequence of the first query that may see the key: a token's own place, or the
    place of the last token that went into a compressed entry."""
    stride: int = 1
    """Tokens a key stands for, at least: key i is seen by no query before (i + 1) * stride - 1."""

    @classmethod
    def of_tokens(cls, document_ids: Int[Tensor, "batch seq"]) -> "Visibility":
        """Keys are the tokens themselves: causal attention within documents."""
        places = torch.arange(document_ids.shape[1], device=document_ids.device)
        return cls(document_ids, document_ids, places.expand_as(document_ids))

    def num_keys(self, end: int) -> int:
        """Leading keys among which are all that the queries before place `end` may see."""
        return min(end // self.stride, self.first_query.shape[1])

    def hidden(self, start: int, end: int, keys: int) -> Bool[Tensor, "batch queries keys"]:
        """True where a query of [start, end) must not see one of the first `keys` keys."""
        return self.hidden_at(torch.arange(start, end, device=self.first_query.device), keys)

    def hidden_at(
        self, places: Int[Tensor, "queries"], keys: int
    ) -> Bool[Tensor, "batch queries keys"]:
        """The same for the queries at any places."""
        other = self.query_documents[:, places, None] != self.key_documents[:, None, :keys]
        return other | (self.first_query[:, None, :keys] > places[:, None])


def select(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys dim"],
    weights: Float[Tensor, "batch queries heads"],
    visible: Visibility,
    k: int,
    *,
    runs: Runs | None = None,
) -> Int[Tensor, "batch queries k"]:
    """Indices of the k visible keys with the largest index scores, in no order.

    Args:
        query: any float type, as the others.
        key: one for all heads.
        weights: of the heads, scales included.
        visible: what each query may see.
        k: keys to select.
        runs: places of the queries in the sequence, in order; None: there is one for every token.

    Returns:
        int32; -1 where a query sees fewer than k keys.
    """
    batch, queries, heads, _ = query.shape
    seq = visible.query_documents.shape[1]
    chosen = query.new_full((batch, queries, k), -1, dtype=torch.int32)
    # Equal scores are told apart by where the row ends: that must depend on neither batch nor ranks.
    size = 1 << (chunk_size(batch * heads * key.shape[1]).bit_length() - 1)
    with torch.no_grad():
        for rows, start, end, _ in chunks(runs or (range(seq),), size):
            keys = visible.num_keys(min(-(-end // CHUNK) * CHUNK, seq))
            if not keys:
                continue
            hidden = visible.hidden(start, end, keys)
            scores = index_scores(query[:, rows], key[:, :keys], weights[:, rows])
            best = best_keys(scores, hidden, min(k, keys))
            chosen[:, rows, : best.shape[-1]] = best
    return chosen


def best_keys(
    scores: Float[Tensor, "batch queries keys"], hidden: Bool[Tensor, "batch queries keys"], k: int
) -> Int[Tensor, "batch queries k"]:
    """int32 indices of the k largest scores, in no order; -1 in place of hidden keys."""
    best = scores.masked_fill(hidden, float("-inf")).topk(k, sorted=False)
    return best.indices.masked_fill_(best.values == float("-inf"), -1).int()


def index_scores(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys dim"],
    weights: Float[Tensor, "batch queries heads"],
) -> Float[Tensor, "batch queries keys"]:
    """`sum_h w_h relu(q_h . k)` in fp32 or wider, over all keys."""
    query, key, weights = (widen(x) for x in (query, key, weights))
    return _weighted(weights, _products(query, key).relu_())


class IndexerLoss:
    """KL divergence of the indexer's distribution from the attention's, gathered chunk by chunk.

        L = sum_t KL(p[t] || softmax(I[t]))                                          (eq. 3, 4)

    p[t] is the teacher: the attention's probabilities summed over heads, L1-normalised here. The
    attention hands it over while it computes, so its scores are computed once: `over_keys` in the
    dense stage, `over_selected` in the sparse one, where softmax and p run over the selected set
    only. Loss and gradient come in one pass; `total` is a node of the autograd graph.

    Args:
        query: any float type, as the others; they get gradients.
        key: one for all heads.
        weights: of the heads, scales included.
    """

    def __init__(
        self,
        query: Float[Tensor, "batch seq heads dim"],
        key: Float[Tensor, "batch keys dim"],
        weights: Float[Tensor, "batch seq heads"],
    ) -> None:
        self._inputs = (query, key, weights)
        self.query, self.key, self.weights = (widen(x.detach()) for x in self._inputs)
        self.grad_query = torch.zeros_like(self.query)
        self.grad_key = torch.zeros_like(self.key)
        self.grad_weights = torch.zeros_like(self.weights)
        self.divergence = self.query.new_zeros(())

    @torch.no_grad()
    def over_keys(
        self,
        start: int,
        target: Float[Tensor, "batch queries keys"],
        hidden: Bool[Tensor, "batch queries keys"],
    ) -> None:
        """Add the queries from number `start` on, over the first keys of the sequence.

        Args:
            start: number of the first query.
            target: attention that each key gets; any scale; 0 where hidden.
            hidden: True where the key is not in the set that p and the softmax run over.
        """
        batch, queries, keys = target.shape
        key = self.key[:, :keys]
        for first, last in query_chunks(0, queries, batch * self.query.shape[2] * keys):
            rows, part = slice(start + first, start + last), slice(first, last)
            query, weights = self.query[:, rows], self.weights[:, rows]
            products = _products(query, key).relu_()
            grad_scores = self._diverge(
                _weighted(weights, products), target[:, part], hidden[:, part]
            )
            self.grad_weights[:, rows] = torch.einsum("bqhk,bqk->bqh", products, grad_scores)
            grad = _through_relu(products, weights, grad_scores).flatten(1, 2)
            self.grad_query[:, rows] = (grad @ key).view_as(query)
            self.grad_key[:, :keys].baddbmm_(grad.transpose(1, 2), query.flatten(1, 2))

    @torch.no_grad()
    def over_selected(
        self,
        start: int,
        target: Float[Tensor, "batch queries k"],
        indices: Int[Tensor, "batch queries k"],
    ) -> None:
        """Add the queries from number `start` on, over the keys that each of them selected.

        Args:
            start: number of the first query.
            target: attention that each selected key gets; any scale; 0 where missing.
            indices: selected keys; -1 where missing.
        """
        batch, queries, k = indices.shape
        rows = slice(start, start + queries)
        # One matrix product a query: batch and queries become one dim.
        query, weights = self.query[:, rows].flatten(0, 1), self.weights[:, rows].flatten(0, 1)
        places = gathered_rows(indices, self.key.shape[1])
        key = self.key.flatten(0, 1).index_select(0, places).view(batch * queries, k, -1)
        products = (query @ key.transpose(1, 2)).relu_()
        scores = (weights.unsqueeze(1) @ products).view(batch, queries, k)
        grad_scores = self._diverge(scores, target, indices < 0).flatten(0, 1)
        self.grad_weights[:, rows] = (products @ grad_scores.unsqueeze(-1)).view(batch, queries, -1)
        grad = _through_relu(products, weights, grad_scores)
        self.grad_query[:, rows] = (grad @ key).view(batch, queries, *query.shape[1:])
        grad_key = (grad.transpose(1, 2) @ query).flatten(0, 1)
        self.grad_key.flatten(0, 1).index_add_(0, places, grad_key)

    def _diverge(self, scores: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        """Add the divergence of some queries; returns its gradient with respect to the scores.

        A query whose keys get no attention at all (V4: no compressed entry yet) adds nothing.
        """
        mass = target.to(scores.dtype).sum(-1, keepdim=True)
        target = target / mass.clamp(min=torch.finfo(scores.dtype).tiny)
        log = torch.log_softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
        # A row that is all hidden is not a number.
        log = log.masked_fill_(hidden | (mass <= 0), 0.0)
        self.divergence += (torch.xlogy(target, target) - target * log).sum()
        return log.exp_().masked_fill_(hidden | (mass <= 0), 0.0).sub_(target)

    def total(self) -> Float[Tensor, ""]:
        """The divergence in nats, summed over all queries; its backward pass is a product."""
        grads = (self.grad_query, self.grad_key, self.grad_weights)
        result: Tensor = _KnownGradient.apply(self.divergence, grads, *self._inputs)  # type: ignore[no-untyped-call]
        return result


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((x * grad).to(dtype) for x, dtype in known)


def topk_recall(
    attention: Float[Tensor, "batch queries keys"],
    hidden: Bool[Tensor, "batch queries keys"],
    selected: Int[Tensor, "batch queries k"],
) -> Float[Tensor, "3"]:
    """How well a selection covers the full attention, summed over queries that see more than k keys.

    A query that sees no more selects all of them and is not counted.

    Args:
        attention: head-summed probabilities over all visible keys, any scale; 0 where hidden.
        hidden: True where a query does not see a key.
        selected: keys that the indexer selected; -1 where missing.

    Returns:
        Share of the attention's own top k keys that were selected; share of the attention's mass on
        the selected keys; and the number of queries, each summed.
    """
    k, keys = selected.shape[-1], attention.shape[-1]
    counted = (~hidden).sum(-1) > k
    chosen = selection_mask(selected, keys)
    best = attention.topk(min(k, keys), sorted=False).indices
    overlap = chosen.gather(-1, best).sum(-1).to(attention.dtype) / k
    mass = (attention * chosen).sum(-1) / attention.sum(-1).clamp(min=1e-30)
    return torch.stack([(x * counted).sum() for x in (overlap, mass, torch.ones_like(mass))])


def selection_mask(
    selected: Int[Tensor, "batch queries k"], keys: int
) -> Bool[Tensor, "batch queries keys"]:
    """True at the selected ones of the first `keys` keys."""
    mask = torch.zeros(*selected.shape[:2], keys + 1, dtype=torch.bool, device=selected.device)
    places = torch.where(selected < 0, keys, selected).long()
    return mask.scatter_(-1, places, True)[..., :keys]


def query_chunks(start: int, end: int, numbers: int) -> Iterator[tuple[int, int]]:
    """Cut the queries [start, end) into pieces of `chunk_size`.

    Args:
        start: first query.
        end: one behind the last query.
        numbers: scores of one query, over all heads and sequences.
    """
    size = chunk_size(numbers)
    for first in range(start, end, size):
        yield first, min(first + size, end)


def chunk_size(numbers: int) -> int:
    """Queries that are computed together; `numbers` are the scores of one, over heads and sequences."""
    return min(CHUNK, max(_FEWEST_QUERIES, _PIECE_NUMBERS // numbers))


def gathered_rows(
    indices: Int[Tensor, "batch queries k"], keys: int
) -> Int[Tensor, "batch*queries*k"]:
    """Rows of `[batch keys]`, flattened, that hold the selected keys; row 0 of each for a -1."""
    first = torch.arange(len(indices), device=indices.device)[:, None, None] * keys
    return (indices.long().clamp_(min=0) + first).flatten()


def widen(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _products(query: Tensor, key: Tensor) -> Float[Tensor, "batch queries heads keys"]:
    """`q_h . k` for every head; batched over sequences, queries and heads are rows."""
    return torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).view(*query.shape[:3], key.shape[1])


def _weighted(weights: Tensor, products: Tensor) -> Float[Tensor, "batch queries keys"]:
    """Sum over heads."""
    return torch.matmul(weights.unsqueeze(2), products).squeeze(2)


def _through_relu(products: Tensor, weights: Tensor, grad_scores: Tensor) -> Tensor:
    """Gradient of `q_h . k`, in the memory of the rectified products."""
    grad = products.sign_().mul_(weights.unsqueeze(-1))
    return grad.mul_(grad_scores.unsqueeze(-2))
