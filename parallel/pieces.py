"""Tokens of other ranks beside a rank's own, where all that are needed are a few; for `sequence`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from parallel.collectives import all_to_all
from parallel.runs import Exchange
from parallel.volume import Axis


def fetch_pieces(
    exchange: Exchange, group: dist.ProcessGroup, axis: Axis, *xs: Float[Tensor, "batch part *_"]
) -> tuple[Float[Tensor, "batch wanted *_"], ...]:
    """The places that the exchange was planned for, of each tensor; differentiable.

    A token that several ranks get has the sum of their gradients.

    Communication: one all-to-all over `group` of the tokens that other ranks have, and one back in
    backward. All ranks of the group take part.

    Args:
        exchange: planned for this rank.
        group: the ranks that hold the tokens.
        axis: what the group is.
        xs: this rank's own tokens; of one type.
    """
    fetched: tuple[Tensor, ...] = _Fetch.apply(exchange, group, axis, *xs)  # type: ignore[no-untyped-call]
    return fetched


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        exchange: Exchange,
        group: dist.ProcessGroup,
        axis: Axis,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group, ctx.axis = exchange, group, axis
        ctx.num_tokens = xs[0].shape[1]
        received = _swap(xs, exchange.sent, exchange.received, group, axis)
        results = tuple(x.new_empty(len(x), exchange.num_rows, *x.shape[2:]) for x in xs)
        for result, x, others in zip(results, xs, received, strict=True):
            for to, rows in exchange.kept:
                result[:, to] = x[:, rows]
            for to, rows in _in_order(exchange.received):
                result[:, to] = others[:, rows]
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        exchange: Exchange = ctx.exchange
        returned = _swap(grads, exchange.received, exchange.sent, ctx.group, ctx.axis)
        totals = tuple(g.new_zeros(len(g), ctx.num_tokens, *g.shape[2:]) for g in grads)
        for total, grad, others in zip(totals, grads, returned, strict=True):
            for to, rows in exchange.kept:
                total[:, rows] += grad[:, to]
            for to, rows in _in_order(exchange.sent):
                total[:, to] += others[:, rows]
        return None, None, None, *totals


def _swap(
    xs: Sequence[Tensor],
    sent: Sequence[Sequence[slice]],
    received: Sequence[Sequence[slice]],
    group: dist.ProcessGroup,
    axis: Axis,
) -> list[Tensor]:
    """The tokens that other ranks sent, `[batch, tokens, ...]` of each tensor, by rank and in order."""
    rows = [slice(0, 0), *(piece for pieces in sent for piece in pieces)]
    outgoing = [torch.cat([x[:, r] for r in rows], dim=1).transpose(0, 1) for x in xs]
    widths = [len(x) * x.shape[2:].numel() for x in xs]
    together = torch.cat([x.flatten(1) for x in outgoing], dim=1)
    arrived = all_to_all(together, _counts(sent), _counts(received), group, axis)
    return [
        torch.unflatten(part, 1, x.shape[:1] + x.shape[2:]).transpose(0, 1)
        for part, x in zip(torch.split(arrived, widths, dim=1), xs, strict=True)
    ]


def _counts(pieces: Sequence[Sequence[slice]]) -> list[int]:
    """Tokens of each rank."""
    return [sum(rows.stop - rows.start for rows in of_rank) for of_rank in pieces]


def _in_order(pieces: Sequence[Sequence[slice]]) -> list[tuple[slice, slice]]:
    """Every piece, and the rows that it has where all stand one after the other."""
    found, done = [], 0
    for rows in (rows for of_rank in pieces for rows in of_rank):
        count = rows.stop - rows.start
        found.append((rows, slice(done, done + count)))
        done += count
    return found
