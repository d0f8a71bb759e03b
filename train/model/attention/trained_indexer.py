"""What every indexer shares: its stage, what it is taught and how, what is counted; base of `dsa`'s.

The two training stages of DeepSeek-V3.2-Exp, section 2.1.1. `train.step` sets the scale of the loss
and takes the sums; `Transformer.set_indexer_stage` sets the stage and freezes what does not learn.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.runs import Span
from parallel.sequence import SequencePart
from train.model.add_loss import add_loss, on_backward
from train.model.attention.config import IndexerConfig, IndexerStage
from train.model.attention.core import Observer
from train.model.attention.indexer import query_chunks

RECALL_QUERIES = 16
"""Queries of a sequence whose selection is compared with the full attention in every step."""


class TrainedIndexer(nn.Module):
    """Base of a lightning indexer. Its input must be detached: it learns from its own loss only."""

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.stage: IndexerStage = config.stage
        """See `IndexerConfig.stage`."""
        self.loss_scale = 0.0
        """Weight of the loss over the tokens of the global batch; set by the step."""
        self._sums: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss is computed now: in training, with gradients, and not idle."""
        return self.training and torch.is_grad_enabled() and self.stage != "dense"

    def selects_among(self, keys: int) -> bool:
        """Whether attention is to a selection of so many keys now, and not to all of them."""
        return self.stage == "sparse" and self.top_k < keys

    def fp32_modules(self) -> list[nn.Module]:
        """Modules that keep fp32 parameters when the model computes in bf16."""
        raise NotImplementedError

    def join(
        self,
        output: Float[Tensor, "*shape"],
        divergence: Float[Tensor, ""],
        recall: Float[Tensor, "3"],
    ) -> Float[Tensor, "*shape"]:
        """The attention's output, through which the loss joins the gradient and both are counted.

        Args:
            output: of the attention layer.
            divergence: `IndexerLoss.total`, summed over this microbatch's queries.
            recall: sums of `topk_recall` over some of them.
        """
        seen = torch.cat([divergence.detach().view(1), recall.to(divergence.dtype)])
        return on_backward(
            add_loss(output, self.loss_scale * divergence), partial(self._count, seen)
        )

    def _count(self, seen: Tensor) -> None:
        self._sums = seen if self._sums is None else self._sums + seen

    def take_sums(self) -> Float[Tensor, "4"]:
        """Divergence (nats) and the sums of `topk_recall`, of the backward passes since the last call."""
        taken, self._sums = self._sums, None
        return torch.zeros(4) if taken is None else taken


def teach_own_queries(part: SequencePart, learn: Observer) -> Observer:
    """Let an indexer learn from the rank's own tokens, and from the attention of all heads.

    Communication: for each chunk of the attention, a sum of its probabilities over the
    tensor-parallel ranks.

    Args:
        part: which of the queries those are.
        learn: takes numbers among the rank's own tokens: a method of `IndexerLoss`.

    Returns:
        What the attention may show the queries of its tensor-parallel group, and its own heads.
    """
    own = range(*part.own_queries.indices(part.num_queries))

    def observe(start: int, probabilities: Tensor, keys: Tensor) -> None:
        probabilities = part.sum_over_heads(probabilities)
        some = range(start, start + probabilities.shape[1])
        first, end = max(own.start, some.start), min(own.stop, some.stop)
        if first < end:
            rows = slice(first - start, end - start)
            learn(first - own.start, probabilities[:, rows], keys[:, rows])

    return observe


class Sample(NamedTuple):
    """Some of the queries of a run."""

    places: Int[Tensor, "queries"]
    """In the sequence."""
    rows: Int[Tensor, "queries"]
    """Among the queries of the rank."""
    own: slice
    """Which of them are tokens of the rank's streams."""
    own_rows: Int[Tensor, "own"]
    """Where those are among the rank's tokens."""


def sample_queries(part: SequencePart, run: Span, numbers: int, like: Tensor) -> Iterator[Sample]:
    """A few queries, evenly spaced over the sequence, of which those in a run are returned.

    Args:
        part: which tokens of the sequence are the rank's.
        run: of the rank's queries.
        numbers: scores of one query; see `query_chunks`.
        like: of the device that the indices are for.
    """
    step = -(-part.length // RECALL_QUERIES)
    spaced = [place for place in range(part.length - 1, -1, -step) if place in run.run]
    if not spaced:
        return
    own = range(*part.own_queries.indices(part.num_queries))
    all_places = torch.arange(spaced[0], spaced[-1] - 1, -step, device=like.device)
    for start, end in query_chunks(0, len(spaced), numbers):
        rows = [place + run.row - run.run.start for place in spaced[start:end]]
        mine = [index for index, row in enumerate(rows) if row in own]
        inside = slice(mine[0], mine[-1] + 1) if mine else slice(0)
        places = all_places[start:end]
        in_queries = places + (run.row - run.run.start)
        yield Sample(places, in_queries, inside, in_queries[inside] - own.start)
