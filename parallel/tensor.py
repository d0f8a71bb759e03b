"""Tensor parallelism: the ranks of a group share the weights of attention, dense FFN and vocabulary.

Called by `apply`. Each rank computes some of the heads, channels or logits, for all tokens of its
group (the queries of `SequencePart`). Between such modules the streams hold each rank's own tokens
only, so two collectives surround each:

    part --gather_queries--> queries --columns--> own heads --rows--> summands --scatter_queries--> part

The model calls both itself; without tensor parallelism they do nothing. What is not cut (norms,
residual sites, down-projections to latents, router, shared expert) is computed by every rank for
its own tokens, and its gradient is summed over the group by FSDP2: see `apply`.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class LookupSite(Protocol):
    """The embedding, as far as parallelism is concerned."""

    lookup: Callable[[Tensor, Tensor], Tensor]
    """(token ids, rows of the vocabulary) -> vectors."""


class VocabularyLookup:
    """Vectors of the tokens whose rows are on this rank, 0 for others: the ranks' results add up.

    Args:
        rank: holds the rank-th of equal pieces of the vocabulary.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(
        self, token_ids: Int[Tensor, "batch queries"], weight: Float[Tensor, "local_vocab hidden"]
    ) -> Float[Tensor, "batch queries hidden"]:
        """Look up what is here."""
        rows = token_ids - self.rank * len(weight)
        elsewhere = (rows < 0) | (rows >= len(weight))
        vectors = F.embedding(rows.masked_fill(elsewhere, 0), weight)
        return vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0)
