"""No device and no peers: one process stands for any rank of any world; for planning only."""

import os

import torch

from parallel.backend.base import Capabilities
from parallel.backend.cpu import CpuBackend
from parallel.torch_compat import init_fake_process_group


class DryBackend(CpuBackend):
    """Groups have ranks and sizes but move no data, tensors have shapes but no memory.

    What is built on it can be counted, never trained.
    """

    name = "dry"
    process_group_backend = "fake"
    capabilities = Capabilities(
        bf16=True, fp64=True, native_average=True, uneven_all_to_all=True, pinned_memory=False
    )

    def device(self, local_rank: int) -> torch.device:
        """The meta device."""
        return torch.device("meta")

    def init_process_group(self, timeout_seconds: float) -> None:
        """Become rank RANK of WORLD_SIZE; nothing can wait, so the timeout does not matter."""
        init_fake_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
