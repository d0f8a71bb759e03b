"""How many bytes a rank sends in an optimizer step, predicted from the recipe.

`mneme plan` asks for it; `tests.distributed.test_traffic` compares it with what was sent. The model is
built on the meta device, without memory: its shapes say what is gathered. See `parallel.traffic` for
the axes, `parallel.volume` for the conventions, and `train.model.traffic` for the tokens.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from parallel.apply import ModelParts, tensor_cuts, units
from parallel.layout import ParallelLayout
from parallel.pipeline_order import gathers, passes
from parallel.pipeline_stages import PipelineStages
from parallel.volume import AXES, Axis, Sharded, gather_bytes, sum_bytes
from train.config import RunConfig
from train.memory_rules import tables_in_host_memory
from train.model.streams import empty_handover
from train.model.traffic import Microbatch, Sent, block_traffic, embedding_traffic, head_traffic
from train.model.transformer import Transformer
from train.monitor import engram, vision
from train.optim.traffic import update_traffic
from train.stages import Phase, phases
from train.training import DTYPES

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
    """Bytes that a rank sends in an optimizer step, by axis.

    Not for a phase in which only the indexers learn (`dense_warmup`): most of the model gets no
    gradient then.

    Args:
        config: the recipe; its rules hold.
        rank: global.
        step: of the run; matters where batches change their shape.
        routed: None: every expert gets the same number of rows.
        sum_itemsize: bytes of a number that is reported: 4 where the device has no fp64.
    """
    layout = ParallelLayout.from_config(config.parallel)
    phase = next(phase for phase in phases(config) if step <= phase.last_step)
    place = layout.coordinates(rank)
    stages = PipelineStages.from_config(config.parallel, config.model.num_layers)
    with torch.device("meta"):
        own = [Transformer(config.model, stages.layers[i]) for i in stages.of_rank(place["pp"])]
    if tables_in_host_memory(config):
        for model in own:
            model.remove_tables()
    if phase.indexer_stage is not None:
        for model in own:
            model.set_indexer_stage(phase.indexer_stage)
    of_step = _Step(config, layout, phase, rank, sum_itemsize)
    moe_layers = sum(len(model.moe_layers()) for model in own)
    update = update_traffic(
        own, config.optim, layout, rank, computed=of_step.itemsize, stored=of_step.stored
    )
    sent = dict.fromkeys(AXES, 0.0)
    for axis, num_bytes in itertools.chain(
        *(of_step.parameters(model.parts(), turn) for turn, model in enumerate(own)),
        *(of_step.tokens(model) for model in own),
        of_step.experts(moe_layers, routed),
        of_step.crossings(stages),
        update,
        of_step.sums(),
    ):
        sent[axis] += num_bytes
    return sent


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    layout: ParallelLayout
    phase: Phase
    rank: int
    sum_itemsize: int

    @property
    def microbatches(self) -> int:
        sequences = self.phase.global_batch_size // self.layout.data_parallel_size
        return -(-sequences // self.phase.micro_batch_size)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the computation."""
        return DTYPES[self.config.train.dtype].itemsize

    @property
    def stored(self) -> int:
        """Bytes of a stored parameter or a summed gradient."""
        return max(4, self.itemsize)

    @property
    def forwards(self) -> int:
        """Forward passes of a block and a microbatch."""
        return 2 if self.config.train.recompute == "full" else 1

    @property
    def place(self) -> dict[str, int]:
        """Of the rank on each axis."""
        return self.layout.coordinates(self.rank)

    def parameters(self, parts: ModelParts, turn: int) -> Iterator[Sent]:
        """Gathers of a stage's parameters, and sums of the gradients of those that learn."""
        cuts = tensor_cuts(parts)
        seen: set[nn.Parameter] = set()
        for unit in units(parts, low_precision=self.itemsize < self.stored):
            stays = unit.stays or not self.config.parallel.reshard_after_forward
            times = 1 if stays else self.gathers(turn)
            itemsize = self.stored if unit.keeps_dtype else self.itemsize
            axis: Axis = "edp" if unit.are_experts else "dp"
            own = [p for module in unit.modules for p in module.parameters() if p not in seen]
            seen.update(own)
            for p in own:
                held = self._expert(p) if unit.are_experts else self._dense(p, cuts.get(p))
                yield axis, times * held.gathered(itemsize)
                if p.requires_grad:
                    yield axis, held.summed(self.stored)

    def gathers(self, turn: int) -> int:
        """Gathers of what is freed after a forward pass: for each pass, if there is no pipeline."""
        if self.layout.pipeline == 1:
            return 2 * self.microbatches
        order = passes(self.config.parallel, self.place["pp"], self.microbatches)
        return gathers(order, turn)

    def _expert(self, parameter: nn.Parameter) -> Sharded:
        layout, copies = self.layout, self.layout.expert_replicate
        shape = (len(parameter) // layout.expert, *parameter.shape[1:])
        return Sharded(shape, layout.expert_data_parallel_size // copies, copies)

    def _dense(self, parameter: nn.Parameter, cut: int | None) -> Sharded:
        layout = self.layout
        tensor = 1 if cut is None else layout.tensor
        shape = (size // tensor if dim == cut else size for dim, size in enumerate(parameter.shape))
        ranks = layout.data * layout.context * layout.tensor // tensor
        return Sharded(tuple(shape), ranks, layout.data_replicate)

    def tokens(self, model: Transformer) -> Iterator[Sent]:
        """What the ranks that share sequences send each other in a stage."""
        place, parallel, config = self.place, self.config.parallel, model.config
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
            indexer = replace(config.indexer, stage=self.phase.indexer_stage)
            config = replace(config, indexer=indexer)
        layers = [int(layer) for layer in model.layers]
        sent = [block_traffic(config, layer, batch) for layer in layers]
        if model.is_first:
            sent.append(embedding_traffic(config, batch))
        if model.is_last:
            reference = parallel.kernels.cross_entropy in ("auto", "reference")
            sent.append(head_traffic(config, batch, reference=reference))
            sent += [
                block_traffic(config, config.num_layers + i, batch) for i in range(config.mtp_depth)
            ]
        for axis, num_bytes in itertools.chain(*sent):
            yield axis, self.microbatches * num_bytes

    def crossings(self, stages: PipelineStages) -> Iterator[Sent]:
        """Streams that other ranks' stages take, gradients for those before; the largest bias."""
        if self.layout.pipeline == 1:
            return
        tokens = self.phase.sequence_length // self.layout.context // self.layout.tensor
        dtype = DTYPES[self.config.train.dtype]
        handed = empty_handover(self.config.model, self.phase.micro_batch_size, tokens, dtype)
        num_bytes = sum(tensor.nbytes for tensor in handed.tensors())
        pp, last = self.place["pp"], len(stages.layers) - 1
        ends = [
            other
            for stage in stages.of_rank(pp)
            for other in (stage - 1, stage + 1)
            if 0 <= other <= last and stages.rank_of(other) != pp
        ]
        yield "pp", float(len(ends) * self.microbatches * num_bytes)
        if self.config.model.num_moe_layers:
            yield "pp", sum_bytes(self.sum_itemsize, self.layout.pipeline)

    def experts(self, moe_layers: int, routed: RoutedRows | None) -> Iterator[Sent]:
        """Dispatch of rows and back, the same of their gradients, and the counts of the rows."""
        moe, ranks = self.config.model.moe, self.layout.expert
        through = moe_layers * self.microbatches
        if routed is None:
            tokens = self.phase.micro_batch_size * self.phase.sequence_length
            tokens //= self.layout.context * self.layout.tensor
            rows = through * tokens * moe.num_experts_per_token * (ranks - 1) / ranks
            routed = RoutedRows(leaving=rows, arriving=rows)
        rows = (self.forwards + 1) * (routed.leaving + routed.arriving)
        yield "ep", rows * self.config.model.hidden_size * self.itemsize
        yield "ep", through * self.forwards * gather_bytes(moe.num_experts * _COUNT, ranks)

    def sums(self) -> Iterator[Sent]:
        """Small sums over the world: labels, losses, the norm, the load of the experts."""
        model, ranks = self.config.model, self.layout.world_size
        stage = self.phase.indexer_stage or model.indexer.stage
        learns = model.num_indexers > 0 and stage != "dense"
        numbers = 3 + 3 + 2 + 4 * learns + (engram.NUM_SUMS if model.engram is not None else 0)
        numbers += vision.NUM_SUMS if model.vision is not None else 0
        yield "world", sum_bytes(numbers * self.sum_itemsize, ranks)
        counts = self.config.model.num_moe_layers * model.moe.num_experts + (
            model.vision is not None
        )
        yield "world", sum_bytes(counts * _COUNT, ranks)
