"""The part of `deep_ep` that `parallel.deepep` uses, over gloo, with the signatures of DeepEP 1.2.

It moves data at the last moment: what has not been waited for is not there. `LOG` has the calls.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOG: list[str] = []
Handle = tuple[Tensor, list[int], list[int], int]
"""Sent tokens by destination, their number for each rank and from each rank, number of tokens."""


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class EventOverlap:
    """Valid only where `async_finish` was set."""

    def __init__(self, finish: Callable[[], None] | None) -> None:
        self.finish = finish

    def current_stream_wait(self) -> None:
        assert self.finish is not None, "waited for what was not asynchronous, or twice"
        LOG.append("wait")
        self.finish()
        self.finish = None


class Buffer:
    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0
    ) -> None:
        assert num_nvl_bytes > 0
        LOG.append("Buffer")
        self.group, self.num_nvl_bytes = group, num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        ranks = self.group.size()
        owner = topk_idx // (num_experts // ranks)
        in_rank = (owner.unsqueeze(-1) == torch.arange(ranks)).any(1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, EventOverlap(None)

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Any, EventOverlap]:
        _check(x, async_finish, allocate_on_comm_stream, previous_event)
        if handle is not None:
            LOG.append("dispatch again")
            assert topk_idx is None
            assert topk_weights is None
            sent, send, receive, _ = handle
            [rows], event = self._move([x[sent]], send, receive, async_finish)
            return rows, None, None, None, None, event
        LOG.append("dispatch")
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        rank, sent = is_token_in_rank.T.nonzero().unbind(1)
        arriving = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(arriving, num_tokens_per_rank, group=self.group)
        send, receive = num_tokens_per_rank.tolist(), arriving.tolist()
        per_rank = len(num_tokens_per_expert) // self.group.size()
        local = topk_idx[sent] - rank.unsqueeze(1) * per_rank
        here = (local >= 0) & (local < per_rank)
        weights = topk_weights[sent] * here
        moved, event = self._move(
            [x[sent], local.where(here, -1), weights], send, receive, async_finish
        )
        rows, indices, row_weights = moved
        per_expert = num_tokens_per_expert.clone()
        dist.all_reduce(per_expert, group=self.group)
        mine = per_expert.view(-1, per_rank)[self.group.rank()].tolist()
        return rows, indices, row_weights, mine, (sent, send, receive, len(x)), event

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums in fp32, in the order of ranks."""
        LOG.append("combine")
        _check(x, async_finish, allocate_on_comm_stream, previous_event)
        sent, send, receive, num_tokens = handle
        assert len(x) == sum(receive)
        values = [x]
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            values.append(topk_weights)
        results = [value.new_full((num_tokens, value.shape[1]), float("nan")) for value in values]
        arrived, event = self._move(values, receive, send, True)
        move = event.finish
        assert move is not None

        def finish() -> None:
            move()
            for result, rows in zip(results, arrived, strict=True):
                total = torch.zeros(result.shape).index_add(0, sent, rows.float())
                result.copy_(total)

        if not async_finish:
            finish()
        combined_weights = results[1] if topk_weights is not None else None
        return results[0], combined_weights, EventOverlap(finish if async_finish else None)

    def _move(
        self, values: list[Tensor], send: list[int], receive: list[int], async_finish: bool
    ) -> tuple[list[Tensor], EventOverlap]:
        shapes = [(sum(receive), value.shape[1]) for value in values]
        received = [value.new_full(s, 77) for value, s in zip(values, shapes, strict=True)]

        def finish() -> None:
            for out, value in zip(received, values, strict=True):
                dist.all_to_all_single(out, value, receive, send, group=self.group)

        if not async_finish:
            finish()
        return received, EventOverlap(finish if async_finish else None)


def _check(x: Tensor, async_finish: bool, on_comm_stream: bool, previous: object) -> None:
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    # As DeepEP asserts.
    assert not on_comm_stream or (previous is not None and async_finish)


def module() -> ModuleType:
    """What stands in for `import deep_ep`."""
    made = ModuleType("deep_ep")
    made.Buffer = Buffer  # type: ignore[attr-defined]
    return made
