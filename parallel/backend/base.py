"""What the framework asks of a device and its collectives; one file per vendor implements it.

`select` picks one, `train.build` brings it up, the loop measures with it. The interface holds only
what they use. Vendor names appear in this folder and nowhere else (a test searches for them).
"""

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a device and its collectives can do, so that callers ask instead of guessing."""

    bf16: bool
    """Matrix products in bfloat16."""
    fp64: bool
    """Double precision in arithmetic and in reductions."""
    native_average: bool
    """The collectives library has an average of its own, not a sum and a division."""
    uneven_all_to_all: bool
    """all-to-all with a different number of rows for every pair of ranks."""
    pinned_memory: bool
    """Page-locked host memory for copies that do not wait."""


class Backend(ABC):
    """A kind of device together with the library that communicates between them."""

    name: ClassVar[str]
    """Value of `parallel.backend`."""
    device_type: ClassVar[str]
    """torch's name of the device."""
    process_group_backend: ClassVar[str]
    """What torch.distributed is initialised with."""
    capabilities: ClassVar[Capabilities]
    debugging: ClassVar[str]
    """What to set so that the collectives library says more, for people who look for a fault."""
    environment: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Variables that the vendor's libraries read, set where the user has set none."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """The reason that this backend cannot be used here; None if it can."""

    def is_available(self) -> bool:
        """Whether ranks can use this backend on this machine."""
        return self.why_unavailable() is None

    def set_environment(self) -> None:
        """Set `environment` before the vendor's libraries read it; the user's values stay."""
        for variable, value in self.environment.items():
            os.environ.setdefault(variable, value)

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of a rank, by its number on this node."""

    @abstractmethod
    def set_device(self, device: torch.device) -> None:
        """Make it the current device of this process."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Most memory in use since `reset_peak_memory`."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start measuring the peak anew."""

    @abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed the random numbers of the current device."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """State of the random numbers of the current device."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Continue with a state that `rng_state` gave."""

    def init_process_group(self, timeout_seconds: float) -> None:
        """Join the default process group by torch elastic's environment variables.

        Args:
            timeout_seconds: a collective that waits longer fails.
        """
        dist.init_process_group(
            self.process_group_backend, timeout=timedelta(seconds=timeout_seconds)
        )


class AcceleratorBackend(Backend):
    """A device with its own memory, driven through torch's device module of that name.

    Untested on hardware here: the calls are those that torch defines for every accelerator.
    """

    package: ClassVar[str | None]
    """Package that adds the device to torch; None if torch itself has it."""

    def load(self) -> str | None:
        """Import the vendor's package, if it is installed; the reason if that fails."""
        if self.package is None or importlib.util.find_spec(self.package) is None:
            return None
        return self._import_error()

    def _import_error(self) -> str | None:
        if self.package is None:
            return None
        try:
            importlib.import_module(self.package)
        # OSError: a vendor library that the package links to is missing.
        except (ImportError, RuntimeError, OSError) as error:
            return f"`import {self.package}` fails: {error}"
        return None

    def why_unavailable(self) -> str | None:
        """The import error of the vendor's package, or what torch says about the device."""
        if reason := self._import_error():
            return reason
        module = torch.get_device_module(self.device_type)
        if not module.is_available():
            return f"torch {torch.__version__} finds no {self.device_type} device"
        library = self.process_group_backend.rpartition(":")[2]
        if not dist.is_backend_available(library):
            return f"torch {torch.__version__} is built without {library}"
        return None

    def device(self, local_rank: int) -> torch.device:
        """The accelerator with the number of the rank."""
        return torch.device(self.device_type, local_rank)

    def set_device(self, device: torch.device) -> None:
        """Make it the current device of this process."""
        torch.get_device_module(self.device_type).set_device(device)

    def synchronize(self) -> None:
        """Wait for all streams of the current device."""
        torch.get_device_module(self.device_type).synchronize()

    def peak_memory_bytes(self) -> int:
        """Most bytes that tensors took of the current device."""
        return int(torch.get_device_module(self.device_type).max_memory_allocated())

    def reset_peak_memory(self) -> None:
        """Start measuring the peak anew."""
        torch.get_device_module(self.device_type).reset_peak_memory_stats()

    def manual_seed(self, seed: int) -> None:
        """Seed the random numbers of the current device."""
        torch.get_device_module(self.device_type).manual_seed(seed)

    def rng_state(self) -> Tensor:
        """State of the random numbers of the current device."""
        state: Tensor = torch.get_device_module(self.device_type).get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        """Continue with a state that `rng_state` gave."""
        torch.get_device_module(self.device_type).set_rng_state(state)
