"""NVIDIA devices and NCCL. Untested on hardware here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from parallel.backend.base import AcceleratorBackend, Capabilities


class CudaBackend(AcceleratorBackend):
    """CUDA through torch itself; gloo stands beside NCCL for tensors that live on the host."""

    name = "cuda"
    device_type = "cuda"
    process_group_backend = "cpu:gloo,cuda:nccl"
    debugging = "NCCL_DEBUG=INFO makes NCCL say what it does; NCCL_SOCKET_IFNAME names its network"
    package = None
    capabilities = Capabilities(
        bf16=True, fp64=True, native_average=True, uneven_all_to_all=True, pinned_memory=True
    )
    # cuBLAS is deterministic only with a fixed workspace (CUDA toolkit, cuBLAS "Reproducibility").
    environment: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    )
