"""Bring tokens to the ranks that hold their experts, and the results back.

A mixture-of-experts layer has a local dispatcher; `parallel.apply` replaces it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.collectives import exchange_rows, start_exchange
from parallel.rows import Permute, order_by_expert, permute, row_multiple, spread
from parallel.traffic import count_sent
from parallel.volume import gather_bytes

Dispatcher = Callable[[Tensor, Tensor, Tensor, nn.Module], Callable[[], Tensor]]
"""(tokens [tokens hidden], expert indices [tokens k], weights [tokens k], experts) sends tokens to
their experts; what it returns is called once, for the weighted sums [tokens hidden]."""
DispatcherKind = Callable[[dist.ProcessGroup, int, Permute], Dispatcher]
"""(ranks that hold different experts, experts over all of them, kernel) -> dispatcher."""


class LocalDispatcher:
    """Bring tokens to experts that are all on this rank, and the results back.

    Args:
        num_experts: experts of the layer.
        permute: the kernel that sorts the tokens by expert.
    """

    def __init__(self, num_experts: int, permute: Permute = permute) -> None:
        self.num_experts = num_experts
        self.permute = permute

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Callable[[], Tensor]:
        """What returns the weighted sum of each token's experts, in the type of `tokens`."""
        order = order_by_expert(expert_indices, self.num_experts, multiple=row_multiple(tokens))
        rows, combine = self.permute(tokens, order)
        return lambda: combine(experts(rows, order.counts), expert_weights)


class AllToAllDispatcher:
    """The reference dispatcher: two uneven all-to-alls of rows and one of counts.

    Rank r of the group holds experts r * n/ranks to (r + 1) * n/ranks - 1. An expert sees its rows
    in the order of source rank and token, so results do not depend on how the tokens are spread.
    On one rank nothing is exchanged, nor sorted a second time: it is the local dispatcher.

    Args:
        group: the expert-parallel ranks.
        num_experts: experts of the layer over all ranks.
        permute: the kernel that sorts this rank's tokens by expert.

    Raises:
        ValueError: the experts cannot be divided evenly among the ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, permute: Permute = permute
    ) -> None:
        if num_experts % group.size():
            raise ValueError(
                f"parallel.expert_parallel_size={group.size()}: must divide "
                f"model.moe.num_experts={num_experts}; use a divisor"
            )
        self.group = group
        self.num_experts = num_experts
        self.permute = permute
        self._local = LocalDispatcher(num_experts, permute)

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Callable[[], Tensor]:
        """Send tokens to their experts; the returned function gives their weighted sums.

        What is computed between the two calls, as the shared expert, hides the exchange of the
        tokens, and its backward pass that of their gradients. The exchange of the counts comes
        first and is not hidden, for the host waits for it; nor is that of the results, for nothing
        is left to compute that does not need them.

        `experts` is called on every rank, also with no rows, and must then still connect its output
        to its input: a rank that left the graph would not join the backward exchange, and the
        others would wait for it.

        Communication: over the expert-parallel group, an all-to-all of `num_experts` integers, then
        one of k rows per token there and one back; the two of rows again in backward.

        Args:
            tokens: of this rank; ranks may have different numbers of them, or none.
            expert_indices: global numbers of each token's experts.
            expert_weights: weight of each expert's output, applied here at the source.
            experts: maps rows sorted by local expert, and the rows of each, to rows. There may be
                rows that belong to no token, see `row_multiple`.

        Returns:
            To be called once. Gives `[tokens, hidden]`, summed over k in order, in fp32 or wider,
            and returned in the type of `tokens`.
        """
        if self.group.size() == 1:
            return self._local(tokens, expert_indices, expert_weights, experts)
        here = order_by_expert(expert_indices, self.num_experts)
        arriving = torch.empty_like(here.counts)
        count_sent("ep", gather_bytes(here.counts.nbytes, self.group.size()))
        dist.all_to_all_single(arriving, here.counts, group=self.group)
        # [rank of the group, local expert]; one copy to the host for both.
        leaving = here.counts.view(self.group.size(), -1)
        arriving = arriving.view(self.group.size(), -1)
        send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
        rows, combine = self.permute(tokens, here)
        arrive = start_exchange(rows, send, receive, self.group, "ep")
        owner = _local_experts(arriving)
        there = order_by_expert(owner, arriving.shape[1], multiple=row_multiple(tokens))

        def collect() -> Tensor:
            results = experts(spread(arrive(), there), there.counts)
            results = results.index_select(0, there.place)
            results = exchange_rows(results, receive, send, self.group, "ep")
            return combine(results, expert_weights)

        return collect


def _local_experts(arriving: Int[Tensor, "ranks local_experts"]) -> Int[Tensor, "rows 1"]:
    """Local expert of each row, rows being sorted by source rank and expert."""
    ranks, local_experts = arriving.shape
    owner = torch.arange(local_experts, device=arriving.device).repeat(ranks)
    return owner.repeat_interleave(arriving.flatten()).unsqueeze(1)
