"""How the tokens of a sequence are spread over ranks, and what moves between them.

Context and tensor parallelism share sequences: each of their cp x tp ranks holds a part of the
tokens in its residual streams. Attention is computed by the ranks of a tensor-parallel group for all
tokens of the group, each for some heads; such tokens are the rank's queries. Ids and labels are
whole sequences on every rank: they are integers, and a rank takes what it needs.

    whole sequence  --take-->  part  --gather_queries-->  queries  --scatter_queries-->  part
                               part  --gather-->  whole sequence
                               part  --with_history-->  part and the tokens before its runs

Which places of the sequence these tokens have is a matter of `runs`. `parallel.apply` gives the
model a `SequenceSplit`; without one nothing is spread and nothing moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from parallel.collectives import gather_dim1, reduce_scatter_dim1, sum_over
from parallel.config import ContextSplit
from parallel.pieces import fetch_pieces
from parallel.runs import (
    Exchange,
    context_runs,
    joined,
    length_problem,
    part_runs,
    reaching_back,
)
from parallel.volume import Axis


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
    _parts: dict[int, "SequencePart"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def axis(self) -> Axis:
        """What `both` counts for: context parallelism, where there is any."""
        return "tp" if self.context is None else "cp"

    def of(self, length: int) -> "SequencePart":
        """This rank's part of sequences of `length` tokens.

        Raises:
            ValueError: the tokens do not divide evenly.
        """
        if length not in self._parts:
            cp, tp = (_rank_and_size(group) for group in (self.context, self.tensor))
            self._parts[length] = SequencePart(self, length, cp, tp)
        return self._parts[length]


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
        self.rank = ranks.index((cp[0], tp[0]))
        """Place among the ranks that share the sequence."""
        self.all_runs = [part_runs(length, (c, cp[1]), (t, tp[1]), split.kind) for c, t in ranks]
        """Places in the sequence of the tokens of every rank's streams, in order."""
        self.runs = self.all_runs[self.rank]
        """Those of this rank."""
        self._all_query_runs = [context_runs(length, (c, cp[1]), split.kind) for c, _ in ranks]
        self.query_runs = self._all_query_runs[self.rank]
        """Places of the tokens of this rank's tensor-parallel group, in order: its queries."""
        width = length // len(ranks)
        self.own_queries = slice(tp[0] * width, (tp[0] + 1) * width)
        """Which of the queries are tokens of this rank's streams."""
        self.is_whole = len(ranks) == 1
        """Whether the sequence is not spread at all."""
        self._exchanges: dict[tuple[int, bool], Exchange] = {}

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

    def own(self, x: Shaped[Tensor, "batch queries *rest"]) -> Shaped[Tensor, "batch part *rest"]:
        """The rank's own tokens of the queries, without a gradient rule."""
        return x if self.num_tokens == self.num_queries else x[:, self.own_queries]

    def gather_queries(
        self, x: Shaped[Tensor, "batch part *rest"]
    ) -> Shaped[Tensor, "batch queries *rest"]:
        """The tokens of all tensor-parallel ranks; what uses them has a part of the heads.

        Communication: an all-gather over tp; a reduce-scatter of the gradients in backward.
        """
        return gather_dim1(x, self.split.tensor, "tp")

    def scatter_queries(
        self, x: Float[Tensor, "batch queries *rest"]
    ) -> Float[Tensor, "batch part *rest"]:
        """Sums over the tensor-parallel ranks' heads, of the rank's own tokens.

        Communication: a reduce-scatter over tp; an all-gather of the gradients in backward.
        """
        return reduce_scatter_dim1(x, self.split.tensor, "tp")

    def gather(self, x: Shaped[Tensor, "batch part *rest"]) -> Shaped[Tensor, "batch seq *rest"]:
        """The tokens of all ranks that share the sequence, in the sequence's order.

        Communication: an all-gather over cp x tp; a reduce-scatter of the gradients in backward.
        """
        gathered = gather_dim1(x, self.split.both, self.split.axis)
        runs = [run for of_rank in self.all_runs for run in of_rank]
        if len(joined(runs)) == 1:
            return gathered
        pieces = torch.split(gathered, [len(run) for run in runs], dim=1)
        order = sorted(range(len(runs)), key=lambda index: runs[index].start)
        return torch.cat([pieces[index] for index in order], dim=1)

    def gather_ranks(
        self, x: Float[Tensor, "batch rows *rest"]
    ) -> Float[Tensor, "batch all_rows *rest"]:
        """What every rank that shares the sequence has, one after the other, in the order of `rank`.

        Communication: an all-gather over cp x tp; a reduce-scatter of the gradients in backward.

        Args:
            x: of the same shape on every rank; its rows need not be tokens.
        """
        return gather_dim1(x, self.split.both, self.split.axis)

    def gather_together(
        self, *xs: Float[Tensor, "batch part _"]
    ) -> tuple[Float[Tensor, "batch seq _"], ...]:
        """`gather` of several tensors of one type in one collective."""
        if self.is_whole:
            return xs
        widths = [x.shape[-1] for x in xs]
        return tuple(torch.split(self.gather(torch.cat(xs, dim=-1)), widths, dim=-1))

    def with_history(
        self, history: int, *xs: Float[Tensor, "batch part *_"]
    ) -> tuple[Float[Tensor, "batch held *_"], ...]:
        """Each of the rank's runs after the `history` tokens before it: `reaching_back(runs)`.

        Communication: an all-to-all over cp x tp of the tokens before the runs only, and one back in
        backward; see `fetch_pieces`.

        Args:
            history: tokens, of any number of ranks; there are fewer at the start of the sequence.
            xs: of the rank's own tokens.
        """
        return self._fetch(history, xs, queries=False)

    def queries_with_history(
        self, history: int, *xs: Float[Tensor, "batch part *_"]
    ) -> tuple[Float[Tensor, "batch held *_"], ...]:
        """The same for the runs of the queries: `reaching_back(query_runs)`."""
        return self._fetch(history, xs, queries=True)

    def sum_over(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum over all ranks that share the sequence, without gradient.

        Communication: an all-reduce over cp x tp.
        """
        both = self.split.both
        return x if both is None else sum_over(x, both, self.split.axis)

    def sum_over_heads(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum over the tensor-parallel ranks, each of which has some heads, without gradient.

        Communication: an all-reduce over tp.
        """
        tensor = self.split.tensor
        return x if tensor is None else sum_over(x, tensor, "tp")

    def _fetch(self, history: int, xs: tuple[Tensor, ...], *, queries: bool) -> tuple[Tensor, ...]:
        if self.split.both is None or not (history or (queries and self.split.tensor)):
            return xs
        if (history, queries) not in self._exchanges:
            runs = self._all_query_runs if queries else self.all_runs
            wanted = [reaching_back(of_rank, history) for of_rank in runs]
            exchange = Exchange.plan(self.all_runs, wanted, self.rank)
            self._exchanges[history, queries] = exchange
        exchange = self._exchanges[history, queries]
        return fetch_pieces(exchange, self.split.both, self.split.axis, *xs)


def _take(x: Tensor, runs: Sequence[range]) -> Tensor:
    if len(runs) == 1 and len(runs[0]) == x.shape[1]:
        return x
    return torch.cat([x[:, run.start : run.stop] for run in runs], dim=1)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())
