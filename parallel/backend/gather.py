"""All-gather and reduce-scatter, as the device of the tensors does them best.

Called by `collectives` and, through `torch_compat`, by FSDP2. Accelerators' libraries have both. Host
memory goes through gloo, whose reduce-scatter sums everything on every rank, and whose all-gather
copies a rank's own part. Here the parts travel in one all-to-all, so each rank sends and receives the
same (n - 1)/n of the whole as a ring would, for any number of ranks n, and adds up its own part only.
Two ranks swap the other's part and copy none.
"""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

SIMULATED = "simulated_hccl"
"""Name of the groups of `parallel.backend.simulated`, in which tensors of the host travel by the
collectives that a device's would."""


def reduce_scatter(
    part: Shaped[Tensor, "part *rest"],
    summand: Shaped[Tensor, "whole *rest"],
    group: dist.ProcessGroup,
) -> None:
    """Fill `part` with this rank's part, along dim 0, of the sum over ranks; in their type.

    On the host the sum is taken in the order of the ranks, whichever arrives first; memory for
    another summand is needed meanwhile, for half of one with two ranks.

    Args:
        part: contiguous; dim 0 is that of `summand` over the ranks.
        summand: of this rank, contiguous.
        group: the ranks that sum.
    """
    if not _travels_by_gloo(summand, group):
        dist.reduce_scatter_single(part, summand, group=group)
        return
    rank, parts = group.rank(), summand.view(group.size(), *part.shape)
    if group.size() == 2:
        _swap(part, parts[1 - rank], group)
        part.add_(parts[rank])  # a + b is b + a, bit by bit
        return
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    part.copy_(received[0])
    for other in received[1:]:
        part.add_(other)


def all_gather(
    whole: Shaped[Tensor, "whole *rest"],
    part: Shaped[Tensor, "part *rest"],
    group: dist.ProcessGroup,
    *,
    async_op: bool = False,
) -> dist.Work | None:
    """Fill `whole` with the parts of all ranks, one after the other along dim 0.

    Args:
        whole: contiguous; dim 0 is that of `part` times the ranks.
        part: of this rank, contiguous; may be its place in `whole`.
        group: the ranks that gather.
        async_op: return at once; `whole` is filled when the returned work is done.
    """
    if not _travels_by_gloo(part, group) or group.size() != 2:
        work: dist.Work | None = dist.all_gather_single(whole, part, group=group, async_op=async_op)
        return work
    mine, other = (whole.view(2, *part.shape)[i] for i in (group.rank(), 1 - group.rank()))
    if mine.data_ptr() != part.data_ptr():
        mine.copy_(part)
    return _swap(other, part, group, async_op=async_op)


def _travels_by_gloo(x: Tensor, group: dist.ProcessGroup) -> bool:
    return x.device.type == "cpu" and dist.get_backend(group) != SIMULATED


def _swap(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """Exchange a tensor with the other one of two ranks."""
    rows = [0, 0]
    rows[1 - group.rank()] = len(sent)
    work: dist.Work | None = dist.all_to_all_single(
        received, sent, rows, rows, group=group, async_op=async_op
    )
    return work
