"""Collectives with the gradients that this framework needs, on public torch.distributed calls.

Used by `expert`, `sequence`, `pieces` and `gradients`. torch's own differentiable collectives are not used: the gradient
of their all-reduce is another all-reduce, and their names change between versions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


def exchange_rows(
    rows: Float[Tensor, "rows hidden"],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> Float[Tensor, "received hidden"]:
    """Send consecutive blocks of rows to the ranks of a group; differentiable in `rows`.

    Communication: one all-to-all over `group` of `rows`, and one back in the backward pass. Every
    rank must take part in both, with no rows if it has none: the result has to stay in its graph.

    Args:
        rows: sorted by destination.
        send_counts: rows for each rank of the group; zeros are fine.
        receive_counts: rows from each rank of the group.
        group: the ranks that exchange.

    Returns:
        The received rows, sorted by source.
    """
    if group.size() == 1:
        return rows  # a copy through gloo costs a sixth of the layer
    received: Tensor = _ExchangeRows.apply(rows, send_counts, receive_counts, group)  # type: ignore[no-untyped-call]
    return received


class _ExchangeRows(torch.autograd.Function):
    """An all-to-all, whose transpose is the all-to-all with the counts swapped."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        rows: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.send_counts, ctx.receive_counts, ctx.group = send_counts, receive_counts, group
        return all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        grad = all_to_all(grads[0], ctx.receive_counts, ctx.send_counts, ctx.group)
        return grad, None, None, None


def all_to_all(
    rows: Shaped[Tensor, "rows *rest"],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> Shaped[Tensor, "received *rest"]:
    """`exchange_rows` without a gradient, also for one rank."""
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(
        received, rows.contiguous(), list(receive_counts), list(send_counts), group=group
    )
    return received


def gather_dim1(
    x: Shaped[Tensor, "batch part *rest"], group: dist.ProcessGroup | None
) -> Shaped[Tensor, "batch whole *rest"]:
    """The ranks' tensors one after the other along dim 1; differentiable.

    For consumers that differ between the ranks: each has a part of the gradient, and the parts add
    up on the rank that the numbers came from.

    Communication: an all-gather over `group`; a reduce-scatter of the gradients in backward.

    Args:
        x: of the same shape on every rank.
        group: None or one rank: `x` itself.
    """
    if group is None or group.size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


def reduce_scatter_dim1(
    x: Float[Tensor, "batch whole *rest"], group: dist.ProcessGroup | None
) -> Float[Tensor, "batch part *rest"]:
    """This rank's piece along dim 1 of the sum over ranks; differentiable, the reverse of a gather.

    Communication: a reduce-scatter over `group`; an all-gather of the gradients in backward.

    Args:
        x: each rank's summand; dim 1 is a multiple of the group's size.
        group: None or one rank: `x` itself.
    """
    if group is None or group.size() == 1:
        return x
    scattered: Tensor = _ReduceScatter.apply(x, group)  # type: ignore[no-untyped-call]
    return scattered


class _Gather(torch.autograd.Function):
    """An all-gather, whose transpose is the reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _reduce_scatter(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """A reduce-scatter, whose transpose is the all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _all_gather(grads[0], ctx.group), None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Collectives join dim 0, so the batch goes behind the tokens and back.
    rows = x.transpose(0, 1).contiguous()
    gathered = rows.new_empty((group.size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_single(gathered, rows, group=group)
    return gathered.transpose(0, 1).contiguous()


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = x.transpose(0, 1).contiguous()
    piece = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
    dist.reduce_scatter_single(piece, rows, group=group)
    return piece.transpose(0, 1).contiguous()


def sum_over(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of every rank's `value`, without gradient, in its dtype; `value` stays as it is.

    Communication: one all-reduce over `group`, the world if None.
    """
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
