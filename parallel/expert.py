"""Bring tokens to the ranks that hold their experts, and the results back.

`parallel.apply` gives one of these to every mixture-of-experts layer in place of its local dispatch.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.collectives import exchange_rows


class AllToAllDispatcher:
    """The reference dispatcher: two uneven all-to-alls of rows and one of counts.

    Rank r of the group holds experts r * n/ranks to (r + 1) * n/ranks - 1. An expert sees its rows
    in the order of source rank and token, so results do not depend on how the tokens are spread.

    Args:
        group: the expert-parallel ranks.
        num_experts: experts of the layer over all ranks.

    Raises:
        ValueError: the experts cannot be divided evenly among the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        if num_experts % group.size():
            raise ValueError(
                f"parallel.expert_parallel_size={group.size()}: must divide "
                f"model.moe.num_experts={num_experts}; use a divisor"
            )
        self.group = group
        self.num_experts = num_experts

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Float[Tensor, "tokens hidden"]:
        """Weighted sum of each token's experts.

        `experts` is called on every rank, also with no rows, and must then still connect its output
        to its input: a rank that left the graph would not join the backward exchange, and the
        others would wait for it.

        Communication: over the expert-parallel group, an all-to-all of `num_experts` integers, then
        one of k rows per token there and one back; the two of rows again in backward.

        Args:
            tokens: of this rank; ranks may have different numbers of them, or none.
            expert_indices: global numbers of each token's experts.
            expert_weights: weight of each expert's output, applied here at the source.
            experts: maps rows sorted by local expert, and the rows of each, to rows.

        Returns:
            Summed over k in order, in fp32 or wider, and returned in the type of `tokens`.
        """
        chosen = expert_indices.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        # [rank of the group, local expert]; one copy to the host for both.
        leaving, arriving = counts.view(self.group.size(), -1), arriving.view(self.group.size(), -1)
        send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()

        rows = tokens.index_select(0, order // expert_indices.shape[1])
        rows = exchange_rows(rows, send, receive, self.group)
        by_expert = _by_local_expert(arriving)
        results = experts(rows.index_select(0, by_expert), arriving.sum(0))
        results = results.index_select(0, _inverse(by_expert))
        results = exchange_rows(results, receive, send, self.group)
        results = results.index_select(0, _inverse(order))
        results = results.view(*expert_indices.shape, tokens.shape[1])
        return _combine(results, expert_weights).to(tokens.dtype)


def _by_local_expert(
    arriving: Int[Tensor, "ranks local_experts"],
) -> Int[Tensor, "rows"]:
    """Where the rows of local expert 0, 1, ... stand among rows sorted by (source, expert)."""
    ranks, local_experts = arriving.shape
    owner = torch.arange(local_experts, device=arriving.device).repeat(ranks)
    return owner.repeat_interleave(arriving.flatten()).argsort(stable=True)


def _inverse(permutation: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """The permutation that undoes one."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _combine(
    results: Float[Tensor, "tokens k hidden"], weights: Float[Tensor, "tokens k"]
) -> Float[Tensor, "tokens hidden"]:
    """Sum over k one after the other: a reduction's order could depend on the number of tokens."""
    wide = torch.promote_types(results.dtype, torch.float32)
    weighted = results.to(wide) * weights.to(wide).unsqueeze(-1)
    first, *others = weighted.unbind(1)
    for part in others:
        first = first + part
    return first
