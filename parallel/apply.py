"""The one place where a model meets its layout; called by `train.build` on a meta-device model.

The order is fixed: weights are cut over the tensor-parallel ranks and experts over the
expert-parallel ones, dispatchers are put in, and last FSDP2 shards everything bottom-up. Parameters
are stored as DTensors, so that checkpoints reshard by themselves, but the model computes on plain
local tensors and knows nothing of ranks.

Every rank's loss is the sum over its own tokens divided by the valid labels of the whole global
batch, so every gradient reduction is a plain sum, for dense parameters and experts alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.backend.kernels import choose_kernels
from parallel.config import ContextSplit, ParallelConfig
from parallel.expert import Dispatcher
from parallel.flash_attention import DenseAttention
from parallel.grouped import GroupedLinear
from parallel.layout import ParallelLayout
from parallel.local_tensors import cut_parameters
from parallel.mesh import Meshes
from parallel.prefetch import prefetch_parameters
from parallel.sequence import SequenceSplit
from parallel.tensor import LookupSite, VocabularyLookup
from parallel.torch_compat import (
    count_parameter_traffic,
    place_tensor_parallel,
    stays_gathered,
)


@runtime_checkable
class DispatchSite(Protocol):
    """A mixture-of-experts layer, as far as parallelism is concerned."""

    num_experts: int
    dispatch: Dispatcher


@runtime_checkable
class GroupedExperts(Protocol):
    """Experts that leave their products to a kernel."""

    grouped_linear: GroupedLinear


@runtime_checkable
class AttentionSite(Protocol):
    """Attention of every token to all earlier ones of its document."""

    dense_attention: DenseAttention | None


@runtime_checkable
class SequenceSite(Protocol):
    """The module that decides which tokens of a sequence a rank computes."""

    split: SequenceSplit


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The parts of a model that are treated differently."""

    root: nn.Module
    """The whole model; parameters that belong to no other part are sharded with it."""
    blocks: Sequence[nn.Module]
    """Modules that are gathered one after the other, in the order of the forward pass; all of them
    run in every pass."""
    expert_modules: Sequence[nn.Module]
    """Modules whose parameters all have the experts as dim 0."""
    dispatch_sites: Sequence[DispatchSite]
    """The layers that call the expert modules."""
    num_experts: int
    """Routed experts of such a layer, 1 if the whole model has none: a pipeline stage may have none
    where others do."""
    attention_sites: Sequence[AttentionSite] = ()
    """Layers with dense attention, for a kernel."""
    sequence_site: SequenceSite | None = None
    """None: the model computes whole sequences on every rank."""
    column_parallel: Sequence[nn.Module] = ()
    """Modules of whose own parameters each tensor-parallel rank holds some outputs (dim 0)."""
    row_parallel: Sequence[nn.Module] = ()
    """Modules of whose own parameters it holds some inputs (dim 1); their results are summands."""
    embedding: LookupSite | None = None
    """The embedding, if it is column-parallel."""
    fp32_modules: Sequence[Sequence[nn.Module]] = ()
    """Modules that keep their parameters as they are stored when the rest computes in bf16, for
    each block in the order of its forward pass. Each is used by calling it, once per pass."""


class Unit(NamedTuple):
    """What is gathered together: parameters of these modules that no unit before it has."""

    modules: Sequence[nn.Module]
    are_experts: bool = False
    keeps_dtype: bool = False
    """Computes in the type that the parameters are stored in."""
    stays: bool = False
    """Is not freed after the forward pass, whatever the recipe says."""


def units(parts: ModelParts, *, low_precision: bool) -> Iterator[Unit]:
    """The units of a model, from the inside out.

    Args:
        parts: of the model.
        low_precision: whether it computes in a type for which some modules keep their own.
    """
    for module in parts.expert_modules:
        yield Unit([module], are_experts=True)
    if low_precision:
        for group in filter(None, parts.fp32_modules):
            # FSDP2 gathers a group again only when a gradient reaches the module that ran last,
            # and gradients of an earlier one may be first. The group is small: it stays.
            yield Unit(group, keeps_dtype=True, stays=True)
    for block in parts.blocks:
        yield Unit([block])
    # What the root holds (embedding, head) is needed right at the start of the backward pass.
    yield Unit([parts.root], stays=True)


def tensor_cuts(parts: ModelParts) -> dict[nn.Parameter, int]:
    """The dim along which tensor parallelism cuts parameters; others stay whole."""
    kinds = enumerate((parts.column_parallel, parts.row_parallel))
    return {
        parameter: dim
        for dim, modules in kinds
        for module in modules
        for parameter in module.parameters(recurse=False)
    }


def apply_parallelism(
    parts: ModelParts,
    layout: ParallelLayout,
    meshes: Meshes,
    config: ParallelConfig,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Shard a model in place; then `to_empty` and `fill_parameters` give it memory and values.

    Args:
        parts: of a model whose parameters are on the meta device, or equal on all ranks.
        layout: the sizes.
        meshes: built from `layout`.
        config: kernels, and whether gathered parameters are freed after the forward pass.
        param_dtype: type that parameters are gathered and computed in; they are stored in their own.
        reduce_dtype: type that gradients are summed over ranks in.

    Raises:
        ValueError: the layout asks for what there is not, or does not fit the number of experts; or
            a kernel does not run on the device.
        RuntimeError: a kernel cannot be imported.
    """
    _check(parts, layout)
    if layout.tensor > 1:
        _share_weights(parts, meshes.tp)
    for experts in parts.expert_modules:
        for module in experts.modules():
            cut_parameters(module, meshes.ep, dim=0)
    install_kernels(parts, meshes.ep, config)
    if parts.sequence_site is not None:
        parts.sequence_site.split = sequence_split(meshes, config.context_split)
    _shard(parts, meshes, config.reshard_after_forward, param_dtype, reduce_dtype)
    for module in parts.root.modules():
        if isinstance(module, FSDPModule):
            # The default would divide by the ranks of each mesh, which differ for experts. Without
            # the second call gloo would be asked for a scaled sum, which it does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    prefetch_parameters(parts.root, parts.blocks, parts.expert_modules)
    parts.root.register_forward_hook(_free_without_backward)


def sequence_split(meshes: Meshes, kind: ContextSplit) -> SequenceSplit:
    """The groups of this rank that share sequences; None where there is nothing to share."""

    def group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
        return mesh.get_group() if mesh.size() > 1 else None

    return SequenceSplit(
        context=group(meshes.cp),
        tensor=group(meshes.tp),
        both=group(meshes.sequence),
        kind=kind,
    )


def set_gradient_sync(root: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums gradients over ranks; off for all but the last microbatch.

    Parameters that are kept after a forward pass are kept for the next microbatch, too.

    Args:
        root: a model that `apply_parallelism` sharded.
        on: False accumulates the unsharded gradients on each rank.
    """
    assert isinstance(root, FSDPModule), "apply_parallelism comes first"
    root.set_requires_gradient_sync(on)
    for module in root.modules():
        if isinstance(module, FSDPModule) and stays_gathered(module):
            module.set_reshard_after_backward(on, recurse=False)


def _check(parts: ModelParts, layout: ParallelLayout) -> None:
    """Raise everything that is wrong at once, on all ranks alike, before any collective."""
    if problems := layout.problems(parts.num_experts):
        raise ValueError("\n".join(problems))


def _share_weights(parts: ModelParts, tp: DeviceMesh) -> None:
    """Keep this rank's piece of every column- and row-parallel weight."""
    for dim, modules in enumerate((parts.column_parallel, parts.row_parallel)):
        for module in modules:
            cut_parameters(module, tp, dim)
    if parts.embedding is not None:
        parts.embedding.lookup = VocabularyLookup(tp.get_local_rank())


def install_kernels(parts: ModelParts, ep: DeviceMesh, config: ParallelConfig) -> None:
    """Give every layer the dispatcher of the recipe, and the experts their products."""
    kernels = choose_kernels(config, ep.device_type)
    for site in parts.dispatch_sites:
        site.dispatch = kernels.dispatcher(ep.get_group(), site.num_experts, kernels.permute)
    for layer in parts.attention_sites:
        layer.dense_attention = kernels.attention
    for module in parts.expert_modules:
        if isinstance(module, GroupedExperts):
            module.grouped_linear = kernels.grouped_linear


def _shard(
    parts: ModelParts,
    meshes: Meshes,
    reshard_after_forward: bool,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Apply FSDP2 bottom-up: a parameter belongs to the innermost unit around it."""
    # Ranks of a tensor-parallel group use a plain parameter on different tokens, so its gradient is
    # summed over them as well: it is sharded over the whole stage.
    place = place_tensor_parallel(meshes.tensor_shard)
    for unit in units(parts, low_precision=param_dtype.itemsize < torch.float32.itemsize):
        # The model decides the types of its activations: nothing is cast behind its back.
        policy = MixedPrecisionPolicy(
            param_dtype=None if unit.keeps_dtype else param_dtype,
            reduce_dtype=reduce_dtype,
            cast_forward_inputs=False,
        )
        fully_shard(
            unit.modules[0] if len(unit.modules) == 1 else list(unit.modules),
            mesh=meshes.expert_shard if unit.are_experts else meshes.stage_shard,
            reshard_after_forward=reshard_after_forward and not unit.stays,
            shard_placement_fn=None if unit.are_experts else place,
            mp_policy=policy,
        )
        count_parameter_traffic(unit.modules[0], "edp" if unit.are_experts else "dp")


def _free_without_backward(root: nn.Module, args: object, output: object) -> None:
    """Free what an evaluation gathered.

    Only a backward pass would, and until then the model would show optimizers and checkpoints the
    gathered parameters in place of the sharded ones.
    """
    if not torch.is_grad_enabled():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
