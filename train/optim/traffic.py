"""What the optimizers send in a step; for `train.volume`. AdamW sends nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from torch import nn

from parallel.apply import tensor_cuts
from parallel.layout import EXPERT_AXES, ParallelLayout
from parallel.owners import Job, Spread, balance
from parallel.shards import part_at
from parallel.volume import Axis, sum_bytes
from train.config import OptimConfig
from train.model.roles import Role, parameter_roles
from train.model.transformer import Transformer
from train.optim.newton_schulz import flops
from train.optim.rounds import at_once
from train.optim.sinkhorn_momentum import NORMALIZATIONS

Work = list[tuple[Job, bool]]
"""Matrices of Muon without their owners yet, and whether they learn."""


def update_traffic(
    stages: Sequence[Transformer],
    config: OptimConfig,
    layout: ParallelLayout,
    rank: int,
    *,
    computed: int,
    stored: int,
) -> Iterator[tuple[Axis, float]]:
    """Muon's matrices to their owners and back, and sums over tables.

    Args:
        stages: of the rank, whole, on the meta device.
        config: which optimizer updates what.
        layout: the sizes.
        rank: global.
        computed: bytes of a number in Muon's iteration.
        stored: bytes of a number in a gradient.
    """
    dense, experts = Work(), Work()
    cuts = {p: dim for stage in stages for p, dim in tensor_cuts(stage.parts()).items()}
    for parameter, role in (pair for stage in stages for pair in _with_roles(stage)):
        learns = parameter.requires_grad
        if role.kind == "matrix" and config.optimizer == "muon":
            if parameter.ndim == 2:
                dense += ((job, learns) for job in _dense(parameter, role, cuts, layout))
            else:
                experts += ((job, learns) for job in _experts(parameter, role, layout, rank))
        elif role.kind in config.tables and config.table_optimizer == "sinkhorn" and learns:
            numbers = NORMALIZATIONS // 2 * parameter.shape[1] + 1
            yield "dp", sum_bytes(numbers * stored, layout.stage_size)
    in_stage = rank % layout.stage_size
    yield "dp", float(computed * _to_owners(dense, in_stage, layout.stage_size))
    copy, _ = _copy_and_shard(layout, rank)
    yield "edp", float(computed * _to_owners(experts, copy, layout.expert_replicate))


def _with_roles(stage: Transformer) -> Iterator[tuple[nn.Parameter, Role]]:
    roles = parameter_roles(stage)
    return ((parameter, roles[name]) for name, parameter in stage.named_parameters())


def _dense(
    parameter: nn.Parameter, role: Role, cuts: Mapping[nn.Parameter, int], layout: ParallelLayout
) -> Iterator[Job]:
    """The matrices of a parameter over the ranks of a stage."""
    mesh: tuple[int, ...] = (layout.data * layout.context * layout.tensor,)
    dims: tuple[int | None, ...] = (0,)
    if parameter in cuts:
        mesh, dims = (layout.data * layout.context, layout.tensor), (0, cuts[parameter])
    if layout.data_replicate > 1:
        mesh, dims = (layout.data_replicate, *mesh), (None, *dims)
    rows, columns = parameter.shape
    for some in _stacked(role):
        yield Job(1, Spread(some, (rows, columns), mesh, dims), 0)


def _experts(
    parameter: nn.Parameter, role: Role, layout: ParallelLayout, rank: int
) -> Iterator[Job]:
    """Those of the experts that are on a rank, over the copies of them."""
    copies, shard = layout.expert_replicate, _copy_and_shard(layout, rank)[1]
    shards = layout.expert_data_parallel_size // copies
    here = len(part_at((shard,), (len(parameter) // layout.expert,), (shards,), (0,))[0])
    _, rows, columns = parameter.shape
    for some in _stacked(role):
        spread = Spread(some, (rows, columns), (copies,), (None,))
        share = max(1, min(at_once(spread), -(-here // copies)))
        for first in range(0, here, share):
            yield Job(min(share, here - first), spread, 0)


def _to_owners(work: Work, rank: int, ranks: int) -> int:
    """Elements that leave a rank, see `map_whole_matrices`."""
    costs = [job.count * flops(*job.spread.matrix_shape) for job, _ in work]
    elements = 0
    for (job, learns), owner in zip(work, balance(costs, ranks), strict=True):
        owned = replace(job, owner=owner)
        if learns and owner == rank:
            elements += sum(owned.size(other) for other in range(ranks) if other != rank)
        elif learns and owned.is_source(rank):
            elements += owned.size(rank)
    return elements


def _copy_and_shard(layout: ParallelLayout, rank: int) -> tuple[int, int]:
    """Place of a rank among the copies of its experts, and among those that share one copy."""
    edp = layout.coordinates(rank, EXPERT_AXES)["edp"]
    return divmod(edp, layout.expert_data_parallel_size // layout.expert_replicate)


def _stacked(role: Role) -> Iterator[range]:
    """Rows of each of the matrices that are one parameter."""
    for end, height in zip(accumulate(role.rows), role.rows, strict=True):
        yield range(end - height, end)
