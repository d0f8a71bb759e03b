"""Huawei Ascend devices and HCCL, by the package torch_npu. Untested on hardware here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from parallel.backend.base import AcceleratorBackend, Capabilities


class AscendBackend(AcceleratorBackend):
    """NPUs; gloo stands beside HCCL for tensors that live on the host.

    HCCL reduces no fp64 (before the 950 series) and emulates the average by a sum and a division.
    Its uneven all-to-all is HcclAlltoAllV. Where torch_npu is installed but its driver libraries
    are not, `import torch` itself fails unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set.
    """

    name = "ascend"
    device_type = "npu"
    process_group_backend = "cpu:gloo,npu:hccl"
    debugging = (
        "ASCEND_SLOG_PRINT_TO_STDOUT=1 ASCEND_GLOBAL_LOG_LEVEL=1 make CANN say what it does; "
        "HCCL_SOCKET_IFNAME names HCCL's network"
    )
    package = "torch_npu"
    capabilities = Capabilities(
        bf16=True, fp64=False, native_average=False, uneven_all_to_all=True, pinned_memory=True
    )
    # Seconds to connect, 120 by default: large jobs start slower. Values as in MindSpeed's scripts.
    environment: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_WHITELIST_DISABLE": "1"}
    )
