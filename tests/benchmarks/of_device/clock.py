"""The device that a benchmark runs on, and its clock.

The host, unless MNEME_BACKEND names another backend or torch finds an accelerator.
"""

import statistics
import time
from collections.abc import Callable

import torch

from parallel.backend.base import Backend
from parallel.backend.select import select_backend


class Device:
    """Where a benchmark's tensors lie."""

    def __init__(self) -> None:
        self.backend: Backend = select_backend("auto")
        self.torch_device = self.backend.device(0)
        self.backend.set_device(self.torch_device)

    @property
    def is_host(self) -> bool:
        """Whether figures are CPU time on one thread, and not seconds of an accelerator."""
        return self.torch_device.type == "cpu"

    @property
    def tokens_per_second(self) -> str:
        """The unit of speeds."""
        return "tokens/CPU-s" if self.is_host else "tokens/s"

    def now(self) -> float:
        """Seconds, when all that was started is done: CPU time on the host, else time that passed."""
        self.backend.synchronize()
        return time.process_time() if self.is_host else time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        """How long a call takes."""
        started = self.now()
        function()
        return self.now() - started

    def matmul_rate(self, dtype: torch.dtype, size: int, repeats: int = 2) -> float:
        """Operations per second of a square product, the best of some after one that warms up."""
        a, b = torch.randn(2, size, size, device=self.torch_device).to(dtype)
        times = [self.seconds(lambda: torch.mm(a, b)) for _ in range(1 + repeats)]
        return 2 * size**3 / min(times[1:])

    def median_seconds(self, function: Callable[[], object], *, warm_up: int, rounds: int) -> float:
        """Median over calls that come after some others."""
        times = [self.seconds(function) for _ in range(warm_up + rounds)]
        return statistics.median(times[warm_up:])
