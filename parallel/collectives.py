"""Collectives with the gradients that this framework needs, on public torch.distributed calls.

Used by `expert` and `gradients`. torch's own differentiable collectives are not used: the gradient
of their all-reduce is another all-reduce, and their names change between versions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
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
        return _all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        grad = _all_to_all(grads[0], ctx.receive_counts, ctx.send_counts, ctx.group)
        return grad, None, None, None


def _all_to_all(
    rows: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> Tensor:
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(
        received, rows.contiguous(), list(receive_counts), list(send_counts), group=group
    )
    return received


def sum_over(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of every rank's `value`, without gradient, in its dtype; `value` stays as it is.

    Communication: one all-reduce over `group`, the world if None.
    """
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
