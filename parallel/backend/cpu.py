"""Host processors and gloo: the reference that every other backend must agree with."""

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from parallel.backend.base import Backend, Capabilities


class CpuBackend(Backend):
    """Ranks are processes of the host; memory is the resident set of the process."""

    name = "cpu"
    device_type = "cpu"
    process_group_backend = "gloo"
    debugging = "GLOO_SOCKET_IFNAME=lo (or eth0) names the network that gloo uses"
    capabilities = Capabilities(
        bf16=True, fp64=True, native_average=True, uneven_all_to_all=True, pinned_memory=False
    )

    def why_unavailable(self) -> str | None:
        """None: there is always a host."""
        return None

    def device(self, local_rank: int) -> torch.device:
        """The host, which all ranks of a node share."""
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        """Nothing to choose."""

    def synchronize(self) -> None:
        """Nothing to wait for: operations return when they are done."""

    def peak_memory_bytes(self) -> int:
        """High-water mark of the resident set; includes Python and libraries."""
        status = Path("/proc/self/status")
        lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
        marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return marks[0] if marks else _lifetime_peak_bytes()

    def reset_peak_memory(self) -> None:
        """Set the mark to what is resident now; only Linux can, elsewhere it keeps rising."""
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def manual_seed(self, seed: int) -> None:
        """Seed torch's default generator."""
        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        """State of torch's default generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Continue with a state that `rng_state` gave."""
        torch.set_rng_state(state)


def _lifetime_peak_bytes() -> int:
    """Peak since the process started; macOS counts in bytes, other systems in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
