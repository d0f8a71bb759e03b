"""Collectives with the gradients that this framework needs, on public torch.distributed calls.

Used by `expert`, `sequence`, `pieces` and `gradients`. torch's own differentiable collectives are not used: the gradient
of their all-reduce is another all-reduce, and their names change between versions.

Each call names the axis that it is for, see `parallel.traffic`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.backend.gather import all_gather, reduce_scatter
from parallel.traffic import count_sent
from parallel.volume import Axis, gather_bytes, sum_bytes


def exchange_rows(
    rows: Float[Tensor, "rows hidden"],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
    axis: Axis,
) -> Float[Tensor, "received hidden"]:
    """Send consecutive blocks of rows to the ranks of a group; differentiable in `rows`.

    Communication: one all-to-all over `group` of `rows`, and one back in the backward pass. Every
    rank must take part in both, with no rows if it has none: the result has to stay in its graph.

    Args:
        rows: sorted by destination.
        send_counts: rows for each rank of the group; zeros are fine.
        receive_counts: rows from each rank of the group.
        group: the ranks that exchange.
        axis: what the group is.

    Returns:
        The received rows, sorted by source.
    """
    return start_exchange(rows, send_counts, receive_counts, group, axis)()


def all_to_all(
    rows: Shaped[Tensor, "rows *rest"],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
    axis: Axis,
) -> Shaped[Tensor, "received *rest"]:
    """`exchange_rows` without a gradient, also for one rank."""
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    _count_leaving(rows, send_counts, group, axis)
    dist.all_to_all_single(
        received, rows.contiguous(), list(receive_counts), list(send_counts), group=group
    )
    return received


def start_exchange(
    rows: Float[Tensor, "rows hidden"],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
    axis: Axis,
) -> Callable[[], Tensor]:
    """`exchange_rows` in two halves: the rows leave now, the returned function waits for them.

    What is computed between the two calls hides the exchange. It hides the one of the backward
    pass as well: autograd runs what was computed later first, so it begins where the rows were
    waited for, goes through what was computed meanwhile, and waits where the rows left.

    Returns:
        To be called once; gives the received rows, sorted by source.
    """
    if group.size() == 1:
        return lambda: rows  # a copy through gloo costs a sixth of the layer
    exchange = _Exchange(list(send_counts), list(receive_counts), group, axis)
    ticket: Tensor = _Leave.apply(rows, exchange)  # type: ignore[no-untyped-call]

    def arrive() -> Tensor:
        received: Tensor = _Arrive.apply(ticket, exchange)  # type: ignore[no-untyped-call]
        return received

    return arrive


class _Exchange:
    """An all-to-all under way, and its transpose: the all-to-all with the counts swapped.

    It holds both buffers until the wait: the collective reads and writes them beside whatever the
    rank computes, and on a device their memory could be given away while it does.
    """

    def __init__(
        self, send: list[int], receive: list[int], group: dist.ProcessGroup, axis: Axis
    ) -> None:
        self.send, self.receive, self.group, self.axis = send, receive, group, axis
        self.under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> None:
        """Let rows leave."""
        sent = rows.contiguous()
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        _count_leaving(rows, send, self.group, self.axis)
        work = dist.all_to_all_single(
            received, sent, receive, send, group=self.group, async_op=True
        )
        assert work is not None, "this rank is not in the group"
        self.under_way = (work, sent, received)

    def wait(self) -> Tensor:
        """The received rows; what comes after on this rank's stream may read them."""
        assert self.under_way is not None, "nothing has left"
        work, _, received = self.under_way
        work.wait()
        self.under_way = None
        return received


class _Leave(torch.autograd.Function):
    """Start an exchange; in the backward pass, wait for it.

    Autograd carries an empty ticket from here to `_Arrive` and back, not the rows: nothing can read
    a buffer that is being written.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:  # noqa: ANN401
        ctx.exchange = exchange
        exchange.start(rows, exchange.send, exchange.receive)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return ctx.exchange.wait(), None


class _Arrive(torch.autograd.Function):
    """Wait for an exchange; in the backward pass, start it."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> Tensor:  # noqa: ANN401
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        exchange = ctx.exchange
        exchange.start(grad, exchange.receive, exchange.send)
        return grad.new_empty(0), None


def gather_dim1(
    x: Shaped[Tensor, "batch part *rest"], group: dist.ProcessGroup | None, axis: Axis
) -> Shaped[Tensor, "batch whole *rest"]:
    """The ranks' tensors one after the other along dim 1; differentiable.

    For consumers that differ between the ranks: each has a part of the gradient, and the parts add
    up on the rank that the numbers came from.

    Communication: an all-gather over `group`; a reduce-scatter of the gradients in backward.

    Args:
        x: of the same shape on every rank.
        group: None or one rank: `x` itself.
        axis: what the group is.
    """
    if group is None or group.size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x, group, axis)  # type: ignore[no-untyped-call]
    return gathered


def reduce_scatter_dim1(
    x: Float[Tensor, "batch whole *rest"], group: dist.ProcessGroup | None, axis: Axis
) -> Float[Tensor, "batch part *rest"]:
    """This rank's piece along dim 1 of the sum over ranks; differentiable, the reverse of a gather.

    Communication: a reduce-scatter over `group`; an all-gather of the gradients in backward.

    Args:
        x: each rank's summand; dim 1 is a multiple of the group's size.
        group: None or one rank: `x` itself.
        axis: what the group is.
    """
    if group is None or group.size() == 1:
        return x
    scattered: Tensor = _ReduceScatter.apply(x, group, axis)  # type: ignore[no-untyped-call]
    return scattered


class _Gather(torch.autograd.Function):
    """An all-gather, whose transpose is the reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, axis: Axis) -> Tensor:  # noqa: ANN401
        ctx.group, ctx.axis = group, axis
        return _all_gather(x, group, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _reduce_scatter(grads[0], ctx.group, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    """A reduce-scatter, whose transpose is the all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, axis: Axis) -> Tensor:  # noqa: ANN401
        ctx.group, ctx.axis = group, axis
        return _reduce_scatter(x, group, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _all_gather(grads[0], ctx.group, ctx.axis), None, None


def _all_gather(x: Tensor, group: dist.ProcessGroup, axis: Axis) -> Tensor:
    def gather(result: Tensor, rows: Tensor) -> None:
        count_sent(axis, gather_bytes(result.nbytes, group.size()))
        all_gather(result, rows, group)

    return _along_dim1(gather, x, x.shape[1] * group.size())


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup, axis: Axis) -> Tensor:
    def scatter(result: Tensor, rows: Tensor) -> None:
        count_sent(axis, gather_bytes(rows.nbytes, group.size()))
        reduce_scatter(result, rows, group)

    return _along_dim1(scatter, x, x.shape[1] // group.size())


def _along_dim1(collective: Callable[[Tensor, Tensor], None], x: Tensor, size: int) -> Tensor:
    """What a collective along dim 0 makes of x along dim 1; `size` is that of the result there.

    The result is no view, of which FSDP2 warns where a pipeline's stage returns it.
    """
    rows = x.transpose(0, 1).contiguous()
    result = x.new_empty((x.shape[0], size, *x.shape[2:]))
    moved = result.transpose(0, 1)
    if moved.is_contiguous():  # a batch of one sequence
        collective(moved, rows)
        return result
    received = torch.empty_like(moved, memory_format=torch.contiguous_format)
    collective(received, rows)
    return result.copy_(received.transpose(0, 1))


def gather_ranks(
    value: Shaped[Tensor, "*shape"], group: dist.ProcessGroup, axis: Axis
) -> Shaped[Tensor, "ranks *shape"]:
    """Every rank's `value`, without gradient.

    Communication: an all-gather over `group`.
    """
    gathered = value.new_empty((group.size(), *value.shape))
    count_sent(axis, gather_bytes(gathered.nbytes, group.size()))
    all_gather(gathered.flatten(), value.detach().flatten(), group)
    return gathered


def sum_over(value: Tensor, group: dist.ProcessGroup | None = None, axis: Axis = "world") -> Tensor:
    """Sum of every rank's `value`, without gradient, in its dtype; `value` stays as it is.

    Communication: one all-reduce over `group`, the world if None.
    """
    total = value.detach().clone()
    count_sent(axis, sum_bytes(total.nbytes, dist.get_world_size(group)))
    dist.all_reduce(total, group=group)
    return total


def largest_over(value: Tensor, group: dist.ProcessGroup, axis: Axis) -> Tensor:
    """The largest of every rank's `value`, without gradient; `value` stays as it is.

    Communication: one all-reduce over `group`.
    """
    largest = value.detach().clone()
    count_sent(axis, sum_bytes(largest.nbytes, group.size()))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def _count_leaving(
    rows: Tensor, send_counts: Sequence[int], group: dist.ProcessGroup, axis: Axis
) -> None:
    """Count the rows that other ranks get."""
    leaving = len(rows) - send_counts[group.rank()]
    count_sent(axis, leaving * rows.shape[1:].numel() * rows.element_size())
