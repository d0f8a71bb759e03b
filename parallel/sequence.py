"""How the tokens of a sequence are spread over ranks, and what moves between them.

Context and tensor parallelism share sequences: each of their cp x tp ranks holds a part of the
tokens in its residual streams. Attention is computed by the ranks of a tensor-parallel group for all
tokens of the group, each for some heads; such tokens are the rank's queries. Ids and labels are
whole sequences on every rank: they are integers, and a rank takes what it needs.

    whole sequence  --take-->  part  --gather_queries-->  queries  --scatter_queries-->  part
                               part  --gather-->  whole sequence

`parallel.apply` gives the model a `SequenceSplit`; without one nothing is spread and nothing moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from parallel.collectives import gather_dim1, reduce_scatter_dim1, sum_over
from parallel.config import ContextSplit


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """The ranks that share sequences, and how they cut them."""

    context: dist.ProcessGroup | None = None
    """Ranks with different tokens and the same heads."""
    tensor: dist.ProcessGroup | None = None
    """Ranks with different heads that share the tokens of one context-parallel rank."""
    both: dist.ProcessGroup | None = None
    """All ranks that share a sequence, context-parallel ranks first: rank = context * tensor_size
    + tensor."""
    kind: ContextSplit = "zigzag"

    def of(self, length: int) -> "SequencePart":
        """This rank's part of sequences of `length` tokens.

        Raises:
            ValueError: the tokens do not divide evenly.
        """
        cp, tp = (_rank_and_size(group) for group in (self.context, self.tensor))
        return SequencePart(self, length, cp, tp)


class SequencePart:
    """Which tokens of sequences of one length are this rank's; moves tokens between ranks.

    Everything is `[batch, tokens, ...]`. Collectives run in the order of the forward pass on all
    ranks of the group, and in reverse order in the backward pass.

    Args:
        split: the groups.
        length: tokens of a sequence.
        cp: this rank's place among the context-parallel ranks, and their number.
        tp: the same for the tensor-parallel ranks.
    """

    def __init__(
        self, split: SequenceSplit, length: int, cp: tuple[int, int], tp: tuple[int, int]
    ) -> None:
        if problem := length_problem(length, cp[1], tp[1], split.kind):
            raise ValueError(problem)
        self.split, self.length = split, length
        ranks = [(c, t) for c in range(cp[1]) for t in range(tp[1])]
        parts = {(c, t): part_runs(length, (c, cp[1]), (t, tp[1]), split.kind) for c, t in ranks}
        self.runs: tuple[range, ...] = parts[cp[0], tp[0]]
        """Places in the sequence of the tokens of this rank's streams, in order."""
        self.query_runs: tuple[range, ...] = context_runs(length, cp, split.kind)
        """Places of the tokens of this rank's tensor-parallel group, in order: its queries."""
        self._gathered_runs = [run for rank in ranks for run in parts[rank]]
        self._in_order = len(_joined(self._gathered_runs)) == 1
        self._places: dict[torch.device, Tensor] = {}
        self.is_whole = len(ranks) == 1
        """Whether the sequence is not spread at all."""
        self.num_ranks = len(ranks)

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence in this rank's streams."""
        return sum(map(len, self.runs))

    @property
    def num_queries(self) -> int:
        """Tokens of a sequence for which this rank computes attention."""
        return sum(map(len, self.query_runs))

    def take(self, x: Shaped[Tensor, "batch seq *rest"]) -> Shaped[Tensor, "batch part *rest"]:
        """The rank's own tokens of whole sequences, without a gradient rule: for integers."""
        return _take(x, self.runs)

    def take_queries(
        self, x: Shaped[Tensor, "batch seq *rest"]
    ) -> Shaped[Tensor, "batch queries *rest"]:
        """The tokens of the rank's tensor-parallel group of whole sequences: for integers."""
        return _take(x, self.query_runs)

    def gather_queries(
        self, x: Shaped[Tensor, "batch part *rest"]
    ) -> Shaped[Tensor, "batch queries *rest"]:
        """The tokens of all tensor-parallel ranks; what uses them has a part of the heads.

        Communication: an all-gather over tp; a reduce-scatter of the gradients in backward.
        """
        return gather_dim1(x, self.split.tensor)

    def scatter_queries(
        self, x: Float[Tensor, "batch queries *rest"]
    ) -> Float[Tensor, "batch part *rest"]:
        """Sums over the tensor-parallel ranks' heads, of the rank's own tokens.

        Communication: a reduce-scatter over tp; an all-gather of the gradients in backward.
        """
        return reduce_scatter_dim1(x, self.split.tensor)

    def gather(self, x: Shaped[Tensor, "batch part *rest"]) -> Shaped[Tensor, "batch seq *rest"]:
        """The tokens of all ranks that share the sequence, in the sequence's order.

        Communication: an all-gather over cp x tp; a reduce-scatter of the gradients in backward.
        """
        whole = gather_dim1(x, self.split.both)
        return whole if self._in_order else whole.index_select(1, self._gathered_places(x.device))

    def sum_over(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum over all ranks that share the sequence, without gradient.

        Communication: an all-reduce over cp x tp.
        """
        return x if self.split.both is None else sum_over(x, self.split.both)

    def _gathered_places(self, device: torch.device) -> Tensor:
        """Where in the concatenation of the ranks' tokens the token of each place is."""
        if device not in self._places:
            runs = [torch.arange(run.start, run.stop) for run in self._gathered_runs]
            self._places[device] = torch.cat(runs).argsort().to(device)
        return self._places[device]


def length_problem(length: int, context: int, tensor: int, kind: ContextSplit) -> str | None:
    """What is wrong with sequences of `length` tokens on `context` x `tensor` ranks, if anything."""
    pieces = context * tensor * (2 if kind == "zigzag" and context > 1 else 1)
    if length % pieces == 0:
        return None
    below = length - length % pieces
    fits = f"{below} or {below + pieces}" if below else str(pieces)
    return (
        f"data.sequence_length={length}: must be a multiple of {pieces} with "
        f"parallel.context_parallel_size={context} (parallel.context_split={kind}) and "
        f"parallel.tensor_parallel_size={tensor}; use {fits}"
    )


def context_runs(length: int, cp: tuple[int, int], kind: ContextSplit) -> tuple[range, ...]:
    """Places of the tokens of a context-parallel rank, in order.

    Args:
        length: tokens of the sequence.
        cp: rank and number of ranks.
        kind: contiguous, or zigzag: causal attention of early tokens costs less, so each rank gets
            the i-th and the i-th last of twice as many pieces.
    """
    rank, size = cp
    if kind == "contiguous" or size == 1:
        piece = length // size
        return (range(rank * piece, (rank + 1) * piece),)
    piece, last = length // (2 * size), 2 * size - 1 - rank
    return _joined(
        [range(rank * piece, (rank + 1) * piece), range(last * piece, (last + 1) * piece)]
    )


def part_runs(
    length: int, cp: tuple[int, int], tp: tuple[int, int], kind: ContextSplit
) -> tuple[range, ...]:
    """Places of the tokens of one rank: the tp-th equal piece of its context-parallel rank's."""
    rank, size = tp
    width = length // cp[1] // size
    start, end, before, found = rank * width, (rank + 1) * width, 0, []
    for run in context_runs(length, cp, kind):
        inside = run[max(0, start - before) : max(0, end - before)]
        if len(inside):
            found.append(inside)
        before += len(run)
    return tuple(found)


def _joined(runs: Sequence[range]) -> tuple[range, ...]:
    """Neighbouring runs as one."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _take(x: Tensor, runs: Sequence[range]) -> Tensor:
    if len(runs) == 1 and len(runs[0]) == x.shape[1]:
        return x
    return torch.cat([x[:, run.start : run.stop] for run in runs], dim=1)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())
