"""An HCCL without an Ascend device: gloo on the host, which refuses what HCCL does not have.

A recipe that trains here asks nothing of HCCL's process group that it refuses. All ranks' traffic
passes, that of FSDP2, DTensor and pipelines too, since torch calls the group that is made here. The
rules are those of Ascend's package for torch (ProcessGroupHCCL.cpp, HCCLUtils.cpp) on devices before
the 950 series, and stricter where it emulates: an average, which it makes of a sum and a division.
Two things stay out of sight: torch takes complex numbers apart into real ones before it sends them,
and arithmetic on the device is the host's.
"""

# ruff: noqa: ANN401, D102 - torch's methods, which it documents, and its options, which have no type

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.backend.base import Capabilities
from parallel.backend.cpu import CpuBackend
from parallel.backend.gather import SIMULATED
from parallel.torch_compat import GlooGroup

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
# Bytes and truth values are summed as int32.
_REDUCED = _FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
_MOVED = _REDUCED | {torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
_INSTEAD = {
    torch.float64: "torch.float32 (`Capabilities.fp64` says so)",
    torch.complex64: "torch.view_as_real",
    torch.complex128: "torch.view_as_real, in float32",
    torch.uint16: "torch.int32",
    torch.uint32: "torch.int64",
    torch.uint64: "torch.int64",
}
_OPERATIONS = {
    op: str(op).rpartition(".")[2]
    for op in (
        *(dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX),
        *(dist.ReduceOp.AVG, dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR),
    )
}
_REFUSED_OPERATIONS = {
    "AVG": "SUM, and divide by the number of ranks (`Capabilities.native_average` says so)",
    "BAND": "MIN of truth values",
    "BOR": "MAX of truth values",
    "BXOR": "an all-gather",
    "PREMUL_SUM": "SUM of what is multiplied before (HCCL has it, for floats; gloo below does not)",
}


class SimulatedBackend(CpuBackend):
    """The host as it would be with HCCL; never chosen by `auto`."""

    name = "simulated"
    process_group_backend = SIMULATED
    capabilities = Capabilities(
        bf16=True, fp64=False, native_average=False, uneven_all_to_all=True, pinned_memory=False
    )

    def init_process_group(self, timeout_seconds: float) -> None:
        """Join the default process group; other groups of this process are made alike."""
        if not dist.is_backend_available(SIMULATED):
            dist.Backend.register_backend(SIMULATED, HcclLikeGroup, devices=["cpu"])
        super().init_process_group(timeout_seconds)


class HcclLikeGroup(GlooGroup):
    """Every collective that HCCL has a rule for, checked before it begins.

    Raises:
        RuntimeError: HCCL has not what is asked for; says what to use instead.
    """

    def allreduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        _check_reduction("all_reduce", tensors, opts.reduceOp)
        return self.gloo.allreduce(tensors, opts)

    def allreduce_coalesced(  # type: ignore[override]
        self, tensors: list[Tensor], opts: Any
    ) -> dist.Work:
        _check_reduction("all_reduce", tensors, opts.reduceOp)
        return self.gloo.allreduce_coalesced(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        _check_reduction("reduce", tensors, opts.reduceOp)
        return self.gloo.reduce(tensors, opts)

    def reduce_scatter(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any
    ) -> dist.Work:
        _check_reduction("reduce_scatter", outputs, opts.reduceOp)
        return self.gloo.reduce_scatter(outputs, inputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        _check_reduction("reduce_scatter", [output], opts.reduceOp)
        return self.gloo.reduce_scatter_single(output, input, opts)

    def reduce_scatter_single_coalesced(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> dist.Work:
        _check_reduction("reduce_scatter", outputs, opts.reduceOp)
        return self.gloo.reduce_scatter_single_coalesced(outputs, inputs, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        _check("broadcast", tensors, _MOVED)
        return self.gloo.broadcast(tensors, opts)

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any
    ) -> dist.Work:
        _check("all_gather", inputs, _MOVED)
        return self.gloo.allgather(outputs, inputs, opts)

    def all_gather_single(  # type: ignore[override]
        self, output: Tensor, input: Tensor, opts: Any
    ) -> dist.Work:
        _check("all_gather", [input], _MOVED)
        return self.gloo.all_gather_single(output, input, opts)

    def all_gather_single_coalesced(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> dist.Work:
        _check("all_gather", inputs, _MOVED)
        return self.gloo.all_gather_single_coalesced(outputs, inputs, opts)

    def all_to_all_single(  # type: ignore[override]
        self, output: Tensor, input: Tensor, receive: list[int], send: list[int], opts: Any
    ) -> dist.Work:
        _check("all_to_all", [input], _MOVED)
        return self.gloo.all_to_all_single(output, input, receive, send, opts)

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> dist.Work:  # noqa: N803
        _check("send", tensors, _MOVED)
        return self.gloo.send(tensors, dstRank, tag)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> dist.Work:  # noqa: N803
        _check("recv", tensors, _MOVED)
        return self.gloo.recv(tensors, srcRank, tag)

    def barrier(self, opts: Any) -> dist.Work:  # type: ignore[override]
        return self.gloo.barrier(opts)


def _check_reduction(call: str, tensors: Iterable[Tensor], op: Any) -> None:
    name = next((name for known, name in _OPERATIONS.items() if op == known), "PREMUL_SUM")
    if name in _REFUSED_OPERATIONS:
        raise RuntimeError(
            f"{call} with ReduceOp.{name}: HCCL has none; use {_REFUSED_OPERATIONS[name]}"
        )
    _check(f"{call} with ReduceOp.{name}", tensors, _REDUCED)


def _check(call: str, tensors: Iterable[Tensor], known: frozenset[torch.dtype]) -> None:
    for tensor in tensors:
        if tensor.dtype not in known:
            instead = _INSTEAD.get(tensor.dtype, "a view as torch.uint8")
            raise RuntimeError(f"{call} of {tensor.dtype}: HCCL has none; use {instead}")
