"""How many bytes a rank sends in an optimizer step, predicted from the recipe.

`mneme plan` asks for it; `tests.distributed.test_traffic` compares it with what was sent. The model is
built on the meta device, without memory: its shapes say what is gathered. See `parallel.traffic` for
the axes, `parallel.volume` for the conventions, and `train.model.traffic` for the tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from parallel.apply import ModelParts, Unit, units
from parallel.layout import EXPERT_AXES, ParallelLayout
from parallel.owners import Job, Spread, balance
from parallel.shards import part_at
from parallel.volume import AXES, Axis, Sharding, gather_bytes, sum_bytes
from train.config import RunConfig
from train.model.roles import Role, parameter_roles
from train.model.traffic import Microbatch, Sent, block_traffic, outer_traffic
from train.model.transformer import Transformer
from train.optim.newton_schulz import flops
from train.optim.rounds import at_once
from train.optim.sinkhorn_momentum import NORMALIZATIONS
from train.stages import Phase, phases

_ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}
_COUNT = 8
"""Bytes of a count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """Rows that cross in the forward passes of a step, a row being a token for one expert."""

    leaving: float
    """From this rank to experts on others, in all layers and microbatches."""
    arriving: float
    """From other ranks to experts here."""


def step_volume(
    config: RunConfig,
    rank: int = 0,
    *,
    step: int = 1,
    routed: RoutedRows | None = None,
    sum_itemsize: int = 8,
) -> dict[Axis, float]:
    """Bytes that a rank sends in an optimizer step, by axis, for a model of which everything learns.

    Args:
        config: the recipe; its rules hold.
        rank: global.
        step: of the run; matters where batches change their shape.
        routed: None: every expert gets the same number of rows.
        sum_itemsize: bytes of a number that is reported: 4 where the device has no fp64.
    """
    layout = ParallelLayout.from_config(config.parallel)
    phase = next(phase for phase in phases(config) if step <= phase.last_step)
    with torch.device("meta"):
        model = Transformer(config.model)
    of_step = _Step(config, layout, phase, rank)
    sent = dict.fromkeys(AXES, 0.0)
    for axis, num_bytes in itertools.chain(
        of_step.parameters(model.parts()),
        of_step.tokens(),
        of_step.experts(routed),
        of_step.updates(model),
        of_step.sums(sum_itemsize),
    ):
        sent[axis] += num_bytes
    return sent


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    layout: ParallelLayout
    phase: Phase
    rank: int

    @property
    def microbatches(self) -> int:
        sequences = self.phase.global_batch_size // self.layout.data_parallel_size
        return -(-sequences // self.phase.micro_batch_size)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the computation."""
        return _ITEMSIZE[self.config.train.dtype]

    @property
    def stored(self) -> int:
        """Bytes of a stored parameter or a summed gradient."""
        return max(4, self.itemsize)

    @property
    def forwards(self) -> int:
        """Forward passes of a block and a microbatch."""
        return 2 if self.config.train.recompute == "full" else 1

    @property
    def moe_layers(self) -> int:
        model = self.config.model
        return model.num_layers - model.num_dense_layers + model.mtp_depth

    def parameters(self, parts: ModelParts) -> Iterator[Sent]:
        """Gathers of parameters and sums of gradients."""
        layout, cuts = self.layout, cut_dims(parts)
        per_copy = layout.data * layout.context
        seen: set[nn.Parameter] = set()
        for unit in units(parts, low_precision=self.itemsize < self.stored):
            own = [p for module in unit.modules for p in module.parameters() if p not in seen]
            seen.update(own)
            itemsize = self.stored if unit.keeps_dtype else self.itemsize
            if unit.are_experts:
                copies = layout.expert_replicate
                ranks = layout.expert_data_parallel_size // copies
                shapes = [(len(p) // layout.expert, *p.shape[1:]) for p in own]
                yield (
                    "edp",
                    self._sharding(ranks, copies, itemsize).bytes(shapes, self._gathers(unit)),
                )
                continue
            whole = [tuple(p.shape) for p in own if p not in cuts]
            cut = [_divided(p.shape, cuts[p], layout.tensor) for p in own if p in cuts]
            for shapes, ranks in ((whole, per_copy * layout.tensor), (cut, per_copy)):
                sharding = self._sharding(ranks, layout.data_replicate, itemsize)
                yield "dp", sharding.bytes(shapes, self._gathers(unit))

    def _sharding(self, ranks: int, copies: int, itemsize: int) -> Sharding:
        return Sharding(ranks=ranks, copies=copies, itemsize=itemsize, sum_itemsize=self.stored)

    def _gathers(self, unit: Unit) -> int:
        """Gathers in a step: once, or for the forward and the backward pass of every microbatch."""
        stays = unit.stays or not self.config.parallel.reshard_after_forward
        return 1 if stays else 2 * self.microbatches

    def tokens(self) -> Iterator[Sent]:
        """What the ranks that share sequences send each other."""
        place, parallel, model = (
            self.layout.coordinates(self.rank),
            self.config.parallel,
            self.config.model,
        )
        batch = Microbatch(
            sequences=self.phase.micro_batch_size,
            length=self.phase.sequence_length,
            cp=(place["cp"], self.layout.context),
            tp=(place["tp"], self.layout.tensor),
            split=parallel.context_split,
            itemsize=self.itemsize,
            forwards=self.forwards,
        )
        if self.phase.indexer_stage is not None:
            model = replace(model, indexer=replace(model.indexer, stage=self.phase.indexer_stage))
        reference = parallel.kernels.cross_entropy in ("auto", "reference")
        of_blocks = (
            block_traffic(model, layer, batch)
            for layer in range(model.num_layers + model.mtp_depth)
        )
        outside = outer_traffic(model, batch, reference=reference)
        for axis, num_bytes in itertools.chain(outside, *of_blocks):
            yield axis, self.microbatches * num_bytes

    def experts(self, routed: RoutedRows | None) -> Iterator[Sent]:
        """Dispatch of rows and back, the same of their gradients, and the counts of the rows."""
        moe, ranks = self.config.model.moe, self.layout.expert
        passes = self.moe_layers * self.microbatches
        if routed is None:
            tokens = self.phase.micro_batch_size * self.phase.sequence_length
            tokens //= self.layout.context * self.layout.tensor
            rows = passes * tokens * moe.num_experts_per_token * (ranks - 1) / ranks
            routed = RoutedRows(leaving=rows, arriving=rows)
        rows = (self.forwards + 1) * (routed.leaving + routed.arriving)
        yield "ep", rows * self.config.model.hidden_size * self.itemsize
        yield "ep", passes * self.forwards * gather_bytes(moe.num_experts * _COUNT, ranks)

    def updates(self, model: Transformer) -> Iterator[Sent]:
        """What the optimizers send: Muon's matrices to their owners and back, sums over tables."""
        roles, optim = parameter_roles(model), self.config.optim
        cuts = cut_dims(model.parts())
        stage, experts = list[Job](), list[Job]()
        for name, parameter in model.named_parameters():
            role = roles[name]
            if role.kind == "matrix" and optim.optimizer == "muon":
                if parameter.ndim == 2:
                    stage += self._matrices(parameter, role, cuts.get(parameter))
                else:
                    experts += self._expert_matrices(parameter, role)
            elif role.kind in optim.tables and optim.table_optimizer == "sinkhorn":
                numbers = NORMALIZATIONS // 2 * parameter.shape[1] + 1
                yield "dp", sum_bytes(numbers * self.stored, self.layout.stage_size)
        yield (
            "dp",
            self._to_owners(stage, self.rank % self.layout.stage_size, self.layout.stage_size),
        )
        if (copies := self.layout.expert_replicate) > 1:
            edp = self.layout.coordinates(self.rank, EXPERT_AXES)["edp"]
            per_copy = self.layout.expert_data_parallel_size // copies
            yield "edp", self._to_owners(experts, edp // per_copy, copies)

    def _matrices(self, parameter: nn.Parameter, role: Role, cut: int | None) -> list[Job]:
        """The matrices of a parameter over the ranks of a stage, without owners yet."""
        layout = self.layout
        mesh: tuple[int, ...] = (layout.data * layout.context, layout.tensor)
        cuts: tuple[int | None, ...] = (0, cut)
        if cut is None:
            mesh, cuts = (layout.data * layout.context * layout.tensor,), (0,)
        if layout.data_replicate > 1:
            mesh, cuts = (layout.data_replicate, *mesh), (None, *cuts)
        rows, columns = parameter.shape
        return [Job(1, Spread(some, (rows, columns), mesh, cuts), 0) for some in _stacked(role)]

    def _expert_matrices(self, parameter: nn.Parameter, role: Role) -> list[Job]:
        """Those of this rank's experts over the copies of them."""
        layout = self.layout
        copies, edp = layout.expert_replicate, layout.coordinates(self.rank, EXPERT_AXES)["edp"]
        per_copy = layout.expert_data_parallel_size // copies
        own = (len(parameter) // layout.expert,)
        here = len(part_at((edp % per_copy,), own, (per_copy,), (0,))[0])
        jobs = []
        for rows in _stacked(role):
            spread = Spread(rows, (parameter.shape[1], parameter.shape[2]), (copies,), (None,))
            share = max(1, min(at_once(spread), -(-here // copies)))
            counts = [min(share, here - first) for first in range(0, here, share)]
            jobs += [Job(count, spread, 0) for count in counts]
        return jobs

    def _to_owners(self, jobs: Sequence[Job], rank: int, ranks: int) -> float:
        """See `map_whole_matrices`."""
        owners = balance([job.count * flops(*job.spread.matrix_shape) for job in jobs], ranks)
        elements = 0
        for job in (replace(job, owner=owner) for job, owner in zip(jobs, owners, strict=True)):
            if job.owner == rank:
                elements += sum(job.size(other) for other in range(ranks) if other != rank)
            elif job.is_source(rank):
                elements += job.size(rank)
        return float(elements * self.itemsize)

    def sums(self, sum_itemsize: int) -> Iterator[Sent]:
        """Small sums over the world: labels, losses, the norm, the load of the experts."""
        model, ranks = self.config.model, self.layout.world_size
        stage = self.phase.indexer_stage or model.indexer.stage
        learns = model.num_indexers and stage != "dense"
        numbers = 3 + 3 + 2 + 4 * learns
        yield "world", sum_bytes(numbers * sum_itemsize, ranks)
        counts = self.moe_layers * model.moe.num_experts + (model.vision is not None)
        yield "world", sum_bytes(counts * _COUNT, ranks)


def cut_dims(parts: ModelParts) -> dict[nn.Parameter, int]:
    """The dim along which tensor parallelism cuts parameters."""
    kinds = enumerate((parts.column_parallel, parts.row_parallel))
    return {
        parameter: dim
        for dim, modules in kinds
        for module in modules
        for parameter in module.parameters(recurse=False)
    }


def _divided(shape: Sequence[int], dim: int, ranks: int) -> tuple[int, ...]:
    return tuple(size // ranks if d == dim else size for d, size in enumerate(shape))


def _stacked(role: Role) -> Iterator[range]:
    """Rows of each of the matrices that are one parameter."""
    for end, height in zip(itertools.accumulate(role.rows), role.rows, strict=True):
        yield range(end - height, end)
