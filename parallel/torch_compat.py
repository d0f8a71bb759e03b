"""The only file with private names of torch. Checked with torch 2.13.0.

A new torch version is checked by running the tests of this folder and adding it to the line above.
"""

from collections.abc import Callable
from copy import copy
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import ProcessGroupGloo, Store
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.pipelining import ScheduleDualPipeV
from torch.distributed.tensor import DTensor, Shard

from parallel.backend.gather import all_gather, reduce_scatter
from parallel.traffic import count_sent
from parallel.volume import Axis, gather_bytes, sum_bytes


def unflatten_mesh(
    mesh: DeviceMesh, sizes: tuple[int, ...], axis_names: tuple[str, ...]
) -> DeviceMesh:
    """Cut a one-dimensional mesh into several axes of the same root, row-major."""
    return mesh._unflatten(0, sizes, axis_names)


def flatten_mesh(mesh: DeviceMesh, axis_name: str) -> DeviceMesh:
    """Join all axes of a mesh into one of the same root."""
    return mesh._flatten(axis_name)


def init_fake_process_group(rank: int, world_size: int) -> None:
    """Join a process group that knows ranks and sizes but moves no data: no peer is needed."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415 - registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


class GlooGroup(dist.ProcessGroup):
    """Ranks that meet through gloo, for a subclass that looks at collectives before they begin.

    torch calls the methods of a subclass, whoever asks: functions of torch.distributed call them by
    name; FSDP2, DTensor and compiled code in C++ come back to Python for those in `PyProcessGroup`.
    The subclass overrides all of these and goes on with the same method of `gloo`. Not with that of
    its base class: it would hold Python's lock while it waits for gloo's threads, and they sometimes
    wait for that.

    Args:
        store: by which the ranks meet.
        rank: of this process in the group.
        size: number of ranks.
        timeout: a collective that waits longer fails.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        # Not (store, rank, size), which makes an object whose methods cannot be overridden.
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.gloo = dist.ProcessGroup(store, rank, size)
        transport = ProcessGroupGloo(store, rank, size, timeout)
        transport._set_sequence_number_for_group()
        kind = dist.ProcessGroup.BackendType.CUSTOM
        for group in (self, self.gloo):
            group._register_backend(torch.device("cpu"), kind, transport)
            group._set_default_backend(kind)


def find_cpp_compiler() -> str | None:
    """The C++ compiler that `torch.compile` uses on the CPU ($CXX, else g++); None without one."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 - a slow import
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


class PromptDualPipeV(ScheduleDualPipeV):
    """DualPipeV in which every pass hands on its result when it ends.

    torch pairs a forward with a backward pass, for those who run the two interleaved, and sends what
    both made after the second. Here they run one after the other, and the first need not wait.
    """

    def _prepare_schedule_with_comms(
        self,
        actions: dict[int, Any],
        format: Literal["compute_only", "compute_comms"] = "compute_only",
    ) -> None:
        passes = {
            rank: [one for action in order for one in (action and action.sub_actions) or [action]]
            for rank, order in actions.items()
        }
        super()._prepare_schedule_with_comms(passes, format)


def accumulate_in_reduce_dtype(root: nn.Module) -> None:
    """Add the parameters' gradients to FSDP2's sums over microbatches, as its own hooks do.

    Those see every backward pass through a module, but not gradients that are put in place later.

    Args:
        root: the module of a `fully_shard` call; others inside it are included.
    """
    for module in root.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def place_tensor_parallel(
    mesh: DeviceMesh,
) -> Callable[[nn.Parameter], ShardPlacementResult | Shard]:
    """For `shard_placement_fn` of FSDP2: parameters that are DTensors over a mesh of their own.

    All are cut along dim 0; plain ones over the mesh of the `fully_shard` call.

    Args:
        mesh: one-dimensional, or two-dimensional (replicas, shards).
    """
    info = FSDPMeshInfo(mesh, shard_mesh_dim=0)
    if mesh.ndim == 2:
        info = HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    elsewhere = ShardPlacementResult(Shard(0), info)
    return lambda parameter: elsewhere if isinstance(parameter, DTensor) else Shard(0)


def local_tensor(parameter: DTensor) -> Tensor:
    """`parameter.to_local()`, whose gradient is a DTensor of the same placements.

    torch's own derives the sizes of the gradient anew and takes it through autograd a second time,
    which costs 0.2 ms for each parameter and microbatch.

    Args:
        parameter: no placement is partial.
    """
    local: Tensor = _Local.apply(parameter)  # type: ignore[no-untyped-call]
    return local


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:  # noqa: ANN401
        ctx.spec = parameter._spec
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ANN401
        # A copy, for torch may change it.
        return DTensor(grad.contiguous(), copy(ctx.spec), requires_grad=False)  # type: ignore[no-untyped-call]


def stays_gathered(module: FSDPModule) -> bool:
    """Whether the parameters of an FSDP2 unit stay gathered after the forward pass."""
    groups = fully_shard.state(module)._fsdp_param_groups  # type: ignore[attr-defined]
    return all(group.post_forward_mesh_info is None for group in groups)


def count_parameter_traffic(module: nn.Module, axis: Axis) -> None:
    """Let the gathers and gradient sums of one FSDP2 unit count for an axis.

    torch's own setters refuse units with parameters on several meshes.
    """
    for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
        group._all_gather_comm = _CountedAllGather(axis)
        group._reduce_scatter_comm = _CountedReduceScatter(axis)
        if isinstance(group.mesh_info, HSDPMeshInfo):
            copies = group.mesh_info.replicate_mesh_size

            def count_sum(gradient: Tensor, copies: int = copies) -> None:
                count_sent(axis, sum_bytes(gradient.nbytes, copies))

            group._all_reduce_hook = count_sum


class _CountedAllGather(DefaultAllGather):
    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        count_sent(self.axis, gather_bytes(output_tensor.nbytes, group.size()))
        return all_gather(output_tensor, input_tensor, group, async_op=async_op)


class _CountedReduceScatter(DefaultReduceScatter):
    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Any:  # noqa: ANN401 - torch promises Work and takes None
        assert op == dist.ReduceOp.SUM, "see apply_parallelism: every reduction is a plain sum"
        assert not async_op, "FSDP2 reduces on a stream of its own"
        count_sent(self.axis, gather_bytes(input_tensor.nbytes, group.size()))
        reduce_scatter(output_tensor, input_tensor, group)
