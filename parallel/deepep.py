"""Expert dispatch through DeepEP, for `parallel.expert_dispatcher=deepep`.

UNTESTED ON HARDWARE: there was no CUDA device to run it on. It is written against the documented
interface of `deep_ep.Buffer` in DeepEP 1.2 (its high-throughput kernels, within and between nodes),
which DeepEP 2 still has, and tested against a stand-in with the same signatures over gloo.

Unlike `parallel.expert.AllToAllDispatcher` a token crosses once to every rank that has one of its
experts, not once to every expert, and each rank returns the weighted sum of its experts in bf16. So
results differ from those of the reference by that rounding.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from functools import cache
from typing import Any

import deep_ep
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.rows import Permute, order_present_by_expert, permute, row_multiple
from parallel.traffic import count_sent


class DeepEPDispatcher:
    """Tokens to their experts and back by DeepEP's `dispatch` and `combine`.

    DeepEP asserts that torch does not fill uninitialised memory in deterministic mode.

    Args:
        group: the expert-parallel ranks, at least 2.
        num_experts: experts of the layer over all ranks.
        permute: the kernel that sorts the received tokens by expert.

    Raises:
        ValueError: DeepEP does not know the number of ranks, or they cannot share the experts.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, permute: Permute = permute
    ) -> None:
        ranks = group.size()
        if num_experts % ranks:
            raise ValueError(
                f"parallel.expert_parallel_size={ranks}: must divide "
                f"model.moe.num_experts={num_experts}; use a divisor"
            )
        try:
            deep_ep.Buffer.get_dispatch_config(ranks)
        except AssertionError as error:
            raise ValueError(
                f"parallel.expert_parallel_size={ranks}: DeepEP says: {error}; use a size it has, "
                "or parallel.expert_dispatcher=all_to_all"
            ) from error
        self.group, self.num_experts, self.permute = group, num_experts, permute

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Callable[[], Tensor]:
        """Send tokens to their experts; the returned function gives their weighted sums.

        What is computed between the two calls hides the way there, and in the backward pass that of
        the gradients back; see `AllToAllDispatcher`, also for the arguments.

        Communication: one `dispatch` and one `combine` of DeepEP, and one of each in backward.

        Raises:
            ValueError: the tokens are not bf16.
        """
        if tokens.dtype != torch.bfloat16:
            raise ValueError(
                f"parallel.expert_dispatcher=deepep: sends bf16, not {tokens.dtype}; use "
                "train.dtype=bf16 or parallel.expert_dispatcher=all_to_all"
            )
        hidden_bytes = tokens.shape[1] * tokens.element_size()
        buffer = _buffer(self.group, hidden_bytes)
        exchange = _Exchange(buffer, expert_indices, self.num_experts, self.group.rank())
        ticket = _Leave.apply(tokens, expert_weights.float(), exchange)  # type: ignore[no-untyped-call]

        def collect() -> Tensor:
            rows, weights = _Arrive.apply(ticket, exchange)  # type: ignore[no-untyped-call]
            local_experts = self.num_experts // self.group.size()
            order = order_present_by_expert(
                exchange.indices, local_experts, multiple=row_multiple(rows)
            )
            sorted_rows, combine = self.permute(rows, order)
            results = experts(sorted_rows, order.counts)
            partial = combine(results, weights[exchange.indices >= 0])
            total: Tensor = _Return.apply(partial, exchange)  # type: ignore[no-untyped-call]
            return total

        return collect


@cache
def _buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Any:
    """DeepEP's memory for a group, one for all layers of this width.

    Communication: DeepEP exchanges handles over `group` when the first layer runs.
    """
    ranks = group.size()
    configs = deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
    nvlink_bytes = max(c.get_nvl_buffer_size_hint(hidden_bytes, ranks) for c in configs)
    rdma_bytes = max(c.get_rdma_buffer_size_hint(hidden_bytes, ranks) for c in configs)
    return deep_ep.Buffer(group, nvlink_bytes, rdma_bytes)


class _Exchange:
    """One dispatch of tokens and what belongs to it, until the backward pass is through.

    It holds what is sent and what arrives until the wait.
    """

    def __init__(self, buffer: Any, expert_indices: Tensor, num_experts: int, rank: int) -> None:
        self.buffer, self.sent_indices, self.num_experts = buffer, expert_indices, num_experts
        self.rank = rank
        self.under_way: tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.handle: Any = None
        """DeepEP's record of where the tokens went, which the other three calls follow."""
        self.indices = expert_indices
        """Local experts of the received tokens, -1 where a choice is another rank's."""

    def start(self, tokens: Tensor, weights: Tensor) -> None:
        """Let tokens leave for their experts; the host waits until it knows how many arrive."""
        sent = tokens.contiguous(), weights.contiguous()
        layout = self.buffer.get_dispatch_layout(self.sent_indices, self.num_experts)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = layout
        rows, self.indices, row_weights, _, self.handle, event = self.buffer.dispatch(
            sent[0],
            topk_idx=self.sent_indices,
            topk_weights=sent[1],
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        self.under_way = event, sent, (rows, row_weights)
        staying = per_rank[self.rank]
        self.leaving, self.returning = per_rank.sum() - staying, len(rows) - staying
        _count_tokens(self.leaving, *sent, self.sent_indices)

    def start_back(self, grad_rows: Tensor, grad_weights: Tensor) -> None:
        """Let the gradients of the received tokens and weights leave for the tokens' ranks."""
        sent = grad_rows.contiguous(), grad_weights.contiguous()
        grad_tokens, grad_token_weights, event = self.buffer.combine(
            sent[0], self.handle, topk_weights=sent[1], async_finish=True
        )
        self.under_way = event, sent, (grad_tokens, grad_token_weights)
        _count_tokens(self.returning, *sent)

    def wait(self) -> tuple[Tensor, ...]:
        """What has arrived; what comes after on this rank's stream may read it."""
        assert self.under_way is not None, "nothing has left"
        event, _, arrived = self.under_way
        event.current_stream_wait()
        self.under_way = None
        return arrived


def _count_tokens(number: Tensor, *values: Tensor) -> None:
    """Count what is sent to other ranks of so many tokens; the host does not wait for the number."""
    count_sent("ep", number * sum(x.shape[1] * x.element_size() for x in values))


class _Leave(torch.autograd.Function):
    """Start a dispatch; in the backward pass, wait for its transpose. See `parallel.collectives`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(tokens, weights)
        return tokens.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.exchange.wait(), None


class _Arrive(torch.autograd.Function):
    """Wait for a dispatch; in the backward pass, start its transpose, a combine."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_back(grad_rows, grad_weights)
        return grad_rows.new_empty(0), None


class _Return(torch.autograd.Function):
    """Sum the ranks' partial results at each token's own rank; the gradient is a dispatch."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        _count_tokens(exchange.returning, partial)
        total: Tensor = exchange.buffer.combine(partial.contiguous(), exchange.handle)[0]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        _count_tokens(exchange.leaving, grad)
        return exchange.buffer.dispatch(grad.contiguous(), handle=exchange.handle)[0], None
